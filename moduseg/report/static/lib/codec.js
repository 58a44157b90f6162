"use strict";
/* Decode label maps from palette PNGs and numbers from base64. Pixels are read from the file, not from a canvas:
   browsers forbid pages on disk to read canvases, and some add noise to them. */

Report.codec = (() => {
  function bytes(text) {
    const raw = atob(text);
    const array = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) array[i] = raw.charCodeAt(i);
    return array;
  }

  /* Numbers are little-endian in the file; a DataView reads them on any machine. */
  function numbers(text, size) {
    const array = bytes(text);
    const view = new DataView(array.buffer);
    const result = size === 2 ? new Uint16Array(array.length / 2) : new Uint32Array(array.length / 4);
    for (let i = 0; i < result.length; i++)
      result[i] = size === 2 ? view.getUint16(2 * i, true) : view.getUint32(4 * i, true);
    return result;
  }

  async function inflate(data) {
    const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  /** Return { width, height, ids } of a PNG of the report: 8-bit palette, rows unfiltered. */
  async function labelMap(text) {
    const file = bytes(text);
    const view = new DataView(file.buffer);
    const [width, height] = [view.getUint32(16), view.getUint32(20)];
    let packed = null;
    for (let at = 8; at + 12 <= file.length;) {
      const length = view.getUint32(at);
      const kind = String.fromCharCode(...file.subarray(at + 4, at + 8));
      if (kind === "IDAT") packed = file.subarray(at + 8, at + 8 + length);
      at += 12 + length;
    }
    const rows = await inflate(packed);
    const ids = new Uint8Array(width * height);
    for (let y = 0; y < height; y++) ids.set(rows.subarray(y * (width + 1) + 1, (y + 1) * (width + 1)), y * width);
    return { width, height, ids };
  }

  /** Return a function from index to its neighbours; row 4294967295 stands for none, similarities are in [-1, 1]. */
  function neighbours(content) {
    const rows = numbers(content.rows, 4);
    const steps = numbers(content.similarities, 2);
    return (index) => {
      const list = [];
      for (let i = index * content.k; i < (index + 1) * content.k; i++) {
        if (rows[i] !== 4294967295) list.push({ row: rows[i], similarity: steps[i] / 10000 - 1 });
      }
      return list;
    };
  }

  /** Load and decode an image's label maps, by name, or its `heat`, by label; kept as long as their text. */
  const decoded = new WeakMap();
  async function mapsOf(index, kind = "labels") {
    const content = await Report.load(`${kind}/${Report.numbered(index)}`);
    if (!decoded.has(content)) {
      decoded.set(
        content,
        (async () => {
          const names = Object.keys(content);
          const maps = await Promise.all(names.map((name) => labelMap(content[name])));
          return Object.fromEntries(names.map((name, i) => [name, maps[i]]));
        })(),
      );
    }
    return decoded.get(content);
  }

  return { numbers, labelMap, neighbours, mapsOf };
})();
