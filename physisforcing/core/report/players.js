"use strict";
// One clock for the videos of a group: a play button, a time slider, a speed. The longest video leads, the others follow it.
// Videos get their data only near the window, because browsers allow a page a limited number of loaded videos.
(() => {
  const DRIFT = 0.08;
  const seconds = (value) => value.toFixed(2) + " s";

  function setUp(group) {
    const videos = [...group.querySelectorAll("video")];
    const sources = videos.map((video) => video.getAttribute("src"));
    const bar = group.querySelector(".controls");
    const play = bar.querySelector("button"), slider = bar.querySelector("input");
    const speed = bar.querySelector("select"), shown = bar.querySelector("output");
    let playing = false, loaded = true, wanted = 0;

    const length = (video) => (Number.isFinite(video.duration) ? video.duration : 0);
    const lead = () => videos.reduce((a, b) => (length(b) > length(a) ? b : a));
    const last = (video) => Math.max(0, length(video) - Number(slider.step) / 2);

    function show() {
      slider.value = String(wanted);
      shown.value = seconds(wanted);
      slider.setAttribute("aria-valuetext", seconds(wanted));
      play.textContent = playing ? "Pause" : "Play";
      group.dataset.playing = String(playing);
    }
    function place(video, time) {
      const target = Math.min(time, last(video));
      if (Math.abs(video.currentTime - target) > 0.001) video.currentTime = target;
    }
    function start(video) {
      video.playbackRate = Number(speed.value);
      video.play().catch(() => {});  // refused or overtaken by a pause: the next turn of the loop tries again
    }
    function tick() {
      if (!playing) return;
      const leader = lead();
      if (leader.ended || leader.currentTime >= last(leader)) {
        videos.forEach((video) => { video.pause(); place(video, 0); });
      } else if (leader.paused) {
        start(leader);
      }
      wanted = leader.currentTime;
      for (const video of videos) {
        if (video === leader) continue;
        if (wanted >= last(video)) {
          if (!video.paused) video.pause();
          if (!video.seeking) place(video, wanted);
        } else {
          if (Math.abs(video.currentTime - wanted) > DRIFT && !video.seeking) place(video, wanted);
          if (video.paused) start(video);
        }
      }
      show();
      requestAnimationFrame(tick);
    }
    function stop() {
      playing = false;
      videos.forEach((video) => video.pause());
      show();
    }
    function measure() {
      const ends = lead();
      if (length(ends)) slider.max = String(last(ends));
      videos.forEach((video) => place(video, wanted));
      show();
    }
    play.addEventListener("click", () => {
      if (playing) { stop(); return; }
      load();
      playing = true;
      tick();
    });
    slider.addEventListener("input", () => {
      load();
      wanted = Number(slider.value);
      stop();
      videos.forEach((video) => place(video, wanted));
    });
    speed.addEventListener("change", () => videos.forEach((video) => { video.playbackRate = Number(speed.value); }));

    function load() {
      if (loaded) return;
      loaded = true;
      videos.forEach((video, i) => { video.preload = "auto"; video.src = sources[i]; });
    }
    function unload() {
      if (!loaded) return;
      stop();
      loaded = false;
      videos.forEach((video) => { video.removeAttribute("src"); video.load(); });
    }
    for (const video of videos) {
      video.controls = false;
      video.addEventListener("loadedmetadata", () => {
        video.style.aspectRatio = `${video.videoWidth} / ${video.videoHeight}`;  // also while it is unloaded again
        measure();
      });
    }
    unload();
    bar.hidden = false;
    show();
    const near = new IntersectionObserver((seen) => {
      if (seen[seen.length - 1].isIntersecting) load(); else unload();
    }, { rootMargin: "400px" });
    near.observe(group);
  }

  document.querySelectorAll("[data-players]").forEach(setUp);
})();
