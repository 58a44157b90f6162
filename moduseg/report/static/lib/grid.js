"use strict";
/* A grid of thousands of tiles that keeps only those near the screen in the page. It scrolls with the page. */

Report.Grid = class {
  /**
   * @param {(item: any, position: number) => HTMLElement} tile makes a tile, a link or button
   * @param {{ width?: number, ratio?: number, caption?: number, label: string }} options smallest width of a tile, its
   *   picture's width by height, pixels below it
   */
  constructor(tile, { width = 168, ratio = 4 / 3, caption = 46, label }) {
    this.make = tile;
    Object.assign(this, { width, ratio, caption });
    this.items = [];
    this.tiles = new Map();
    this.element = Report.h("div", { class: "grid", role: "group", "aria-label": label });
    this.element.addEventListener("keydown", (event) => this.keys(event));
    this.update = this.update.bind(this);
    this.queued = false;
    const queue = () => {
      if (this.queued) return;
      this.queued = true;
      requestAnimationFrame(() => {
        this.queued = false;
        this.update();
      });
    };
    addEventListener("scroll", queue, { passive: true });
    new ResizeObserver(queue).observe(this.element);
  }

  /** Show items, in their order. */
  show(items) {
    this.items = items;
    this.forget();
  }

  /** Make every visible tile again. */
  forget() {
    for (const tile of this.tiles.values()) tile.remove();
    this.tiles.clear();
    this.update();
  }

  layout() {
    const gap = 14;
    const available = this.element.clientWidth;
    const minWidth = available < 480 ? Math.min(this.width, 140) : this.width;
    const columns = Math.max(1, Math.floor((available + gap) / (minWidth + gap)));
    const width = (available - gap * (columns - 1)) / columns;
    return { gap, columns, width, picture: width / this.ratio, height: width / this.ratio + this.caption };
  }

  update() {
    if (!this.element.isConnected || !this.element.clientWidth) return;
    const { gap, columns, width, picture, height } = this.layout();
    const rows = Math.ceil(this.items.length / columns);
    this.element.style.height = `${Math.max(0, rows * (height + gap) - gap)}px`;
    const top = this.element.getBoundingClientRect().top;
    // One more screen above and below is kept, so that pictures are decoded before they scroll in.
    const first = Math.max(0, Math.floor((-top - innerHeight) / (height + gap)));
    const last = Math.min(rows - 1, Math.floor((innerHeight * 2 - top) / (height + gap)));
    const wanted = new Set();
    for (
      let position = first * columns;
      position <= Math.min(this.items.length - 1, last * columns + columns - 1);
      position++
    )
      wanted.add(position);
    for (const [position, tile] of this.tiles) {
      if (!wanted.has(position) && !tile.contains(document.activeElement)) {
        tile.remove();
        this.tiles.delete(position);
      }
    }
    for (const position of wanted) {
      let tile = this.tiles.get(position);
      if (!tile) {
        tile = this.make(this.items[position], position);
        tile.dataset.position = position;
        this.tiles.set(position, tile);
        this.element.append(tile);
      }
      const [x, y] = [(position % columns) * (width + gap), Math.floor(position / columns) * (height + gap)];
      tile.style.transform = `translate(${x}px, ${y}px)`;
      tile.style.width = `${width}px`;
      tile.style.height = `${height}px`;
      tile.style.setProperty("--picture", `${picture}px`);
    }
  }

  keys(event) {
    const tile = event.target.closest("[data-position]");
    if (!tile) return;
    const { columns, height, gap } = this.layout();
    const at = Number(tile.dataset.position);
    const step = {
      ArrowRight: 1,
      ArrowLeft: -1,
      ArrowDown: columns,
      ArrowUp: -columns,
      Home: -at,
      End: this.items.length - 1 - at,
    }[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const to = Math.max(0, Math.min(this.items.length - 1, at + step));
    const line = this.element.getBoundingClientRect().top + Math.floor(to / columns) * (height + gap);
    if (line < 90 || line + height > innerHeight - 10)
      scrollBy(0, line < 90 ? line - 90 : line + height - innerHeight + 24);
    this.update();
    this.tiles.get(to)?.focus({ preventScroll: true });
  }
};
