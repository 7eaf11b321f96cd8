"""What is said of a part beside its weights."""

import json

from diffusers import ConfigMixin


class PortableConfig(ConfigMixin):
    """A configuration that is saved without the folder that its owner was loaded from.

    Diffusers writes that path along, which says nothing to whoever gets the files and something of who made them.
    """

    def to_json_string(self) -> str:
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
