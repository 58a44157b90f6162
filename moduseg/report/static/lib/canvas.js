"use strict";
/* A photograph with a layer over it, to zoom and move; it reports the pixel under the pointer. */

Report.ImageCanvas = class {
  /**
   * @param {{ title?: string, onMove?: Function, onPick?: Function, onView?: Function }} options `onMove(point|null)`
   *   and `onPick(point)` get pixels of the maps; `onView(view)` a new zoom and position, for a second canvas to follow
   */
  constructor({ title, onMove, onPick, onView } = {}) {
    const { h, svg } = Report;
    Object.assign(this, { onMove, onPick, onView });
    this.view = { scale: 1, x: 0, y: 0 };
    this.photo = h("img", { class: "photo", alt: "", draggable: "false" });
    this.layer = h("canvas", { class: "layer" });
    this.lines = h("canvas", { class: "layer lines", hidden: true });
    this.hover = svg("0 0 1 1", "", "layer mark hover");
    this.chosen = svg("0 0 1 1", "", "layer mark chosen");
    this.plane = h("div", { class: "plane" }, this.photo, this.layer, this.lines, this.hover, this.chosen);
    this.element = h(
      "div",
      { class: "image-canvas" },
      this.plane,
      title ? h("span", { class: "canvas-title" }, title) : null,
    );
    this.pointers = new Map();
    this.element.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    for (const kind of ["pointerdown", "pointermove", "pointerup", "pointercancel"])
      this.element.addEventListener(kind, (event) => this[kind](event));
    this.element.addEventListener("pointerleave", () => this.onMove?.(null));
    this.element.addEventListener("dblclick", (event) => this.zoom(this.view.scale > 1.01 ? 0 : 2.5, event));
    new ResizeObserver(() => this.fit()).observe(this.element);
  }

  /** Show another image: `width` and `height` of its maps, `source` of the photograph or `null`. */
  show(width, height, source) {
    Object.assign(this, { width, height });
    this.photo.hidden = source === null;
    if (source !== null) this.photo.src = source;
    this.layer.width = this.layer.height = 0;
    this.lines.hidden = true;
    for (const mark of [this.hover, this.chosen]) {
      mark.setAttribute("viewBox", `0 0 ${width} ${height}`);
      mark.firstElementChild.setAttribute("d", "");
    }
    this.view = { scale: 1, x: 0, y: 0 };
    this.fit();
  }

  fit() {
    if (!this.width || !this.element.clientWidth) return;
    const scale = Math.min(this.element.clientWidth / this.width, this.element.clientHeight / this.height);
    this.plane.style.width = `${this.width * scale}px`;
    this.plane.style.height = `${this.height * scale}px`;
    this.apply();
  }

  apply() {
    const { scale, x, y } = this.view;
    this.plane.style.transform = `translate(-50%, -50%) translate(${x}px, ${y}px) scale(${scale})`;
    // Photographs are smoothed unless the zoom shows single pixels.
    this.photo.classList.toggle("pixels", (scale * this.plane.clientWidth) / this.width > 12);
  }

  set(view, silent) {
    const scale = Math.max(1, Math.min(24, view.scale));
    const [w, h] = [this.plane.clientWidth * scale, this.plane.clientHeight * scale];
    // The picture cannot be lost: it covers the canvas or lies inside it.
    const clamp = (value, size, space) =>
      Math.max(-Math.max(0, (size - space) / 2), Math.min(Math.max(0, (size - space) / 2), value));
    this.view = {
      scale,
      x: clamp(view.x, w, this.element.clientWidth),
      y: clamp(view.y, h, this.element.clientHeight),
    };
    this.apply();
    if (!silent) this.onView?.(this.view);
  }

  /** Zoom by a factor around the pointer, or the middle; 0 shows all. */
  zoom(factor, event) {
    if (factor === 0) return this.set({ scale: 1, x: 0, y: 0 });
    const bounds = this.element.getBoundingClientRect();
    const px = event ? event.clientX - bounds.left - bounds.width / 2 : 0;
    const py = event ? event.clientY - bounds.top - bounds.height / 2 : 0;
    const scale = Math.max(1, Math.min(24, this.view.scale * factor));
    const ratio = scale / this.view.scale;
    this.set({ scale, x: px - (px - this.view.x) * ratio, y: py - (py - this.view.y) * ratio });
  }

  wheel(event) {
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0022)), event);
  }

  pointerdown(event) {
    if (event.button) return;
    this.element.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, event);
    this.press = { x: event.clientX, y: event.clientY, view: { ...this.view }, moved: this.pointers.size > 1 };
  }

  pointermove(event) {
    const before = this.pointers.get(event.pointerId);
    if (before) this.pointers.set(event.pointerId, event);
    if (this.pointers.size === 2 && before) {
      const [a, b] = [...this.pointers.values()];
      const other = event.pointerId === a.pointerId ? b : a;
      const distance = (p) => Math.hypot(p.clientX - other.clientX, p.clientY - other.clientY);
      const middle = { clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 };
      this.zoom(distance(event) / Math.max(1, distance(before)), middle);
    } else if (before && this.press) {
      const [dx, dy] = [event.clientX - this.press.x, event.clientY - this.press.y];
      if (Math.hypot(dx, dy) > 4) this.press.moved = true;
      if (this.press.moved) this.set({ scale: this.view.scale, x: this.press.view.x + dx, y: this.press.view.y + dy });
    } else {
      this.onMove?.(this.point(event));
    }
  }

  pointerup(event) {
    const click = this.press && !this.press.moved && this.pointers.size === 1;
    this.pointers.delete(event.pointerId);
    if (click) {
      const point = this.point(event);
      if (point) this.onPick?.(point);
    }
    if (!this.pointers.size) this.press = null;
  }

  pointercancel(event) {
    this.pointers.delete(event.pointerId);
    this.press = null;
  }

  /** Return the pixel of the maps under the pointer; null outside. */
  point(event) {
    const bounds = this.plane.getBoundingClientRect();
    const x = Math.floor(((event.clientX - bounds.left) / bounds.width) * this.width);
    const y = Math.floor(((event.clientY - bounds.top) / bounds.height) * this.height);
    return x >= 0 && y >= 0 && x < this.width && y < this.height ? { x, y, at: y * this.width + x } : null;
  }

  /** Outline a region, or remove the outline if `inside` is `null`. `which` is `hover` or `chosen`. */
  mark(which, inside) {
    this[which].firstElementChild.setAttribute(
      "d",
      inside ? Report.paint.outline(this.width, this.height, inside) : "",
    );
  }
};
