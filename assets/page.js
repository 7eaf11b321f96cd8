() => {
  // The line in the plot follows the clip; a press on the plot goes there.
  const clip = () => document.querySelector("#clip video");
  const seconds = (video) => Math.floor(video.duration * 10 + 0.2) / 10; // of picture: its sound ends a little later
  let last, next;
  const follow = () => {
    const video = clip();
    const at = video?.duration ? Math.min(1, video.currentTime / seconds(video)) : 0;
    if (at !== last) document.documentElement.style.setProperty("--at", (last = at));
    cancelAnimationFrame(next);
    if (video && !video.paused) next = requestAnimationFrame(follow); // not beside a stream, which needs the machine
  };
  for (const name of ["play", "seeked", "loadeddata", "emptied"]) {
    document.addEventListener(name, (event) => event.target === clip() && follow(), true); // they do not bubble
  }
  follow();
  document.addEventListener("click", (event) => {
    const picture = event.target.closest?.("#plot img");
    const video = clip();
    if (!picture || !video?.duration) return;
    const style = getComputedStyle(document.documentElement);
    const [left, right] = ["--axis-left", "--axis-right"].map((name) => Number(style.getPropertyValue(name)));
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width - left) / (right - left);
    video.currentTime = Math.min(Math.max(at, 0), 0.999) * seconds(video);
  });
}
