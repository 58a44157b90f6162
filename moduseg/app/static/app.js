// What the pointer does in the labelled picture: the class under it, clicks, boxes. Gradio hears of them by `ms-event`.
(() => {
  const MIN_BOX = 8; // pixels of the screen; a shorter way is a click
  let labels = { address: "", map: null }; // pixels of the label map that is shown
  let drag = null;
  let cross = [0.5, 0.5]; // where the keys are, as shares of the picture's sides

  const pictureOf = (event) => (event.target instanceof Element ? event.target.closest(".ms-picture") : null);

  function readLabels(picture) {
    const source = picture.querySelector(".ms-labels");
    if (source.src === labels.address) return labels.map;
    if (!source.complete || !source.naturalWidth) return null;
    const canvas = document.createElement("canvas");
    canvas.width = source.naturalWidth;
    canvas.height = source.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(source, 0, 0);
    labels = { address: source.src, map: context.getImageData(0, 0, canvas.width, canvas.height) };
    return labels.map;
  }

  // Shares of the picture's width and height, in [0, 1].
  function place(picture, event) {
    const frame = picture.querySelector(".ms-painted").getBoundingClientRect();
    const clip = (value) => Math.min(1, Math.max(0, value));
    return [clip((event.clientX - frame.left) / frame.width), clip((event.clientY - frame.top) / frame.height)];
  }

  function labelAt(picture, [x, y]) {
    const map = readLabels(picture);
    if (!map) return null;
    const column = Math.min(map.width - 1, Math.floor(x * map.width));
    const row = Math.min(map.height - 1, Math.floor(y * map.height));
    return map.data[4 * (row * map.width + column)];
  }

  function mark(label) {
    for (const entry of document.querySelectorAll(".ms-legend li")) {
      entry.classList.toggle("ms-here", entry.dataset.label === String(label));
    }
  }

  // Say the class at a place beside it.
  function say(picture, at) {
    const tip = picture.querySelector(".ms-tip");
    const label = labelAt(picture, at);
    if (label === null) return;
    tip.textContent = JSON.parse(picture.dataset.names)[label];
    tip.hidden = false;
    tip.style.left = `${100 * at[0]}%`;
    tip.style.top = `${100 * at[1]}%`;
    tip.classList.toggle("ms-left", at[0] > 0.7);
    tip.classList.toggle("ms-up", at[1] > 0.85);
    mark(label);
  }

  function send(picture, box) {
    picture.dispatchEvent(new CustomEvent("ms-event", { bubbles: true, detail: { box } }));
  }

  function drawBox(picture, [x0, y0], [x1, y1]) {
    const box = picture.querySelector(".ms-box");
    picture.querySelector(".ms-tip").hidden = true;
    box.hidden = false;
    box.style.left = `${100 * Math.min(x0, x1)}%`;
    box.style.top = `${100 * Math.min(y0, y1)}%`;
    box.style.width = `${100 * Math.abs(x1 - x0)}%`;
    box.style.height = `${100 * Math.abs(y1 - y0)}%`;
  }

  const isLong = (event) => Math.hypot(event.clientX - drag.x, event.clientY - drag.y) >= MIN_BOX;
  // A finger scrolls the page unless boxes are to be drawn by touch.
  const mayDraw = (event) => event.pointerType !== "touch" || document.querySelector("#ms-draws input")?.checked;

  document.addEventListener("pointerdown", (event) => {
    const picture = pictureOf(event);
    if (!picture || event.button !== 0) return;
    drag = { picture, x: event.clientX, y: event.clientY, start: place(picture, event) };
  });
  document.addEventListener("pointermove", (event) => {
    const picture = pictureOf(event);
    if (drag && mayDraw(event) && isLong(event)) drawBox(drag.picture, drag.start, place(drag.picture, event));
    else if (picture) say(picture, place(picture, event));
  });
  document.addEventListener("pointerup", (event) => {
    if (!drag) return;
    const end = place(drag.picture, event);
    if (!isLong(event)) send(drag.picture, [...drag.start, ...drag.start]);
    else if (mayDraw(event)) send(drag.picture, [...drag.start, ...end]);
    drag = null;
  });
  document.addEventListener("pointercancel", () => {
    if (drag) drag.picture.querySelector(".ms-box").hidden = true;
    drag = null;
  });
  document.addEventListener("click", (event) => {
    const example = event.target.closest(".ms-example");
    if (!example) return;
    example.dispatchEvent(new CustomEvent("ms-event", { bubbles: true, detail: { name: example.dataset.name } }));
  });
  document.addEventListener("pointerout", (event) => {
    const picture = pictureOf(event);
    if (!picture || picture.contains(event.relatedTarget)) return;
    picture.querySelector(".ms-tip").hidden = true;
    mark(null);
  });
  // The same with keys.
  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  document.addEventListener("keydown", (event) => {
    const picture = event.target;
    if (!(picture instanceof Element) || !picture.matches(".ms-picture")) return;
    const step = STEPS[event.key];
    if (step) {
      const size = event.shiftKey ? 0.1 : 0.02;
      cross = cross.map((value, axis) => Math.min(0.999, Math.max(0, value + size * step[axis])));
      const sign = picture.querySelector(".ms-cross");
      sign.hidden = false;
      sign.style.left = `${100 * cross[0]}%`;
      sign.style.top = `${100 * cross[1]}%`;
      say(picture, cross);
    } else if (event.key === "Enter") send(picture, [...cross, ...cross]);
    else return;
    event.preventDefault();
  });
  // A new picture: the box has been answered.
  document.addEventListener(
    "load",
    (event) => {
      if (event.target.matches?.(".ms-painted")) event.target.parentElement.querySelector(".ms-box").hidden = true;
    },
    true,
  );
  document.addEventListener("change", (event) => {
    if (!event.target.closest("#ms-draws")) return;
    // Gradio confines the style sheet to its own container, so that a class of the body has no effect.
    document.documentElement.style.setProperty("--ms-touch", event.target.checked ? "none" : "pan-y pinch-zoom");
  });
})();
