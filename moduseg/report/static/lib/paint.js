"use strict";
/* Paint label maps, errors and proposals as layers over a photograph. */

Report.paint = (() => {
  const ERRORS = [
    ["correct", "#2ea043", "an object's pixel with the right label"],
    ["missed", "#e63c32", "an object's pixel labelled background"],
    ["extra", "#f0aa00", "background labelled as an object"],
    ["confused", "#a855f7", "an object's pixel labelled as another"],
    ["ignored", "#8a8f98", "not scored"],
  ];
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

  function onto(canvas, width, height, fill) {
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const picture = context.createImageData(width, height);
    const words = new Uint32Array(picture.data.buffer);
    fill(words, (r, g, b, a) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0);
    context.putImageData(picture, 0, 0);
  }

  /** Paint a label map in the classes' colours, outlined darker; `only` paints one label and dims the rest. */
  function labels(canvas, map, only = null) {
    const { ignore } = Report.get("summary");
    onto(canvas, map.width, map.height, (words, word) => {
      const [table, edges] = [new Uint32Array(256), new Uint32Array(256)];
      for (let label = 0; label < 256; label++) {
        const [r, g, b] = rgb(Report.colour(label));
        if (only !== null)
          table[label] =
            label === only ? word(...(label ? [r, g, b] : [255, 255, 255]), label ? 255 : 60) : word(0, 0, 0, 150);
        else table[label] = label === 0 ? word(0, 0, 0, 0) : word(r, g, b, label === ignore ? 160 : 210);
        edges[label] = label === 0 || label === ignore ? 0 : word(0.45 * r, 0.45 * g, 0.45 * b, 255);
      }
      const { ids, width, height } = map;
      for (let i = 0, y = 0; y < height; y++) {
        for (let x = 0; x < width; x++, i++) {
          const label = ids[i];
          const isEdge =
            edges[label] &&
            ((x > 0 && ids[i - 1] !== label) ||
              (x + 1 < width && ids[i + 1] !== label) ||
              (y > 0 && ids[i - width] !== label) ||
              (y + 1 < height && ids[i + width] !== label));
          words[i] = isEdge && (only === null || only === label) ? edges[label] : table[label];
        }
      }
    });
  }

  /** Paint errors in the colours of ERRORS; correct background shows the photograph, dimmed. */
  function errors(canvas, truth, prediction) {
    const { ignore } = Report.get("summary");
    onto(canvas, truth.width, truth.height, (words, word) => {
      const [correct, missed, wrong, confused, ignored] = ERRORS.map(([, hex]) => word(...rgb(hex), 235));
      const clear = word(0, 0, 0, 90);
      for (let i = 0; i < words.length; i++) {
        const [t, p] = [truth.ids[i], prediction.ids[i]];
        if (t === ignore) words[i] = ignored;
        else if (t === p) words[i] = t ? correct : clear;
        else if (p === 0) words[i] = missed;
        else words[i] = t === 0 ? wrong : confused;
      }
    });
  }

  /** Paint how sure each pixel's label is: doubtful ones are dark, where it is certain the photograph shows. */
  function confidence(canvas, map) {
    onto(canvas, map.width, map.height, (words, word) => {
      for (let i = 0; i < words.length; i++) words[i] = word(20, 0, 60, 255 - map.ids[i]);
    });
  }

  /* From the lowest score to the highest: each colour is brighter than the one before, also to the colour-blind. */
  const HEAT = ["#08051d", "#5a1166", "#b5364f", "#f2813a", "#fbf6a8"];

  /** Paint a map of scores, whose ids are steps of 1/255, from dark to bright. */
  function heat(canvas, map) {
    const stops = HEAT.map(rgb);
    onto(canvas, map.width, map.height, (words, word) => {
      const table = Uint32Array.from({ length: 256 }, (_, step) => {
        const at = (step / 255) * (stops.length - 1);
        const low = Math.min(Math.floor(at), stops.length - 2);
        const mixed = stops[low].map((value, i) => Math.round(value + (at - low) * (stops[low + 1][i] - value)));
        return word(...mixed, 255);
      });
      for (let i = 0; i < words.length; i++) words[i] = table[map.ids[i]];
    });
  }

  /** Return a colour that differs strongly from those of the neighbours in the list. */
  function distinct(index) {
    const hue = (47 + index * 137.508) % 360;
    const [s, l] = [
      [78, 56],
      [60, 46],
      [90, 66],
    ][index % 3];
    const f = (n) => {
      const k = (n + hue / 30) % 12;
      return Math.round(
        255 * (l / 100 - (s / 100) * Math.min(l / 100, 1 - l / 100) * Math.max(-1, Math.min(k - 3, 9 - k, 1))),
      );
    };
    return [f(0), f(8), f(4)];
  }

  /** Paint proposals, large ones first so that nested ones stay visible. `layers` are decoded id maps. */
  function proposals(canvas, layers, why) {
    const { width, height } = layers[0];
    const order = why.area
      .map((_, i) => i)
      .filter((i) => why.layer[i] >= 0)
      .sort((a, b) => why.area[b] - why.area[a]);
    const rank = new Map(order.map((proposal, i) => [proposal, i]));
    onto(canvas, width, height, (words, word) => {
      const top = new Int32Array(words.length).fill(-1);
      layers.forEach((map, number) => {
        const byCode = new Int32Array(256).fill(-1);
        why.layer.forEach((layer, i) => {
          if (layer === number) byCode[why.code[i]] = rank.get(i);
        });
        for (let i = 0; i < top.length; i++) if (map.ids[i]) top[i] = Math.max(top[i], byCode[map.ids[i]]);
      });
      const clear = word(0, 0, 0, 130);
      for (let i = 0; i < words.length; i++) words[i] = top[i] < 0 ? clear : word(...distinct(order[top[i]]), 255);
    });
  }

  /** Draw the borders of all proposals at three times the maps' resolution, so that lines stay thin. */
  function borders(canvas, maps, scale = 3) {
    const { width, height } = maps[0];
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    for (const [offset, ink] of [
      [1, "rgba(0,0,0,.55)"],
      [0, "rgba(255,255,255,.95)"],
    ]) {
      context.fillStyle = ink;
      for (const { ids } of maps) {
        for (let y = 0; y < height; y++) {
          for (let x = 0; x < width; x++) {
            const i = y * width + x;
            if (x + 1 < width && ids[i] !== ids[i + 1])
              context.fillRect((x + 1) * scale + offset - 1, y * scale, 1, scale);
            if (y + 1 < height && ids[i] !== ids[i + width])
              context.fillRect(x * scale, (y + 1) * scale + offset - 1, scale, 1);
          }
        }
      }
    }
  }

  /** Return the outline of a region as an SVG path along pixel edges. `inside(i)` tells which pixels are in it. */
  function outline(width, height, inside) {
    let path = "";
    // Each run of edges becomes one line: horizontal runs above each row, then vertical runs left of each column.
    for (let y = 0; y <= height; y++) {
      for (let x = 0, start = -1; x <= width; x++) {
        const edge = x < width && (y > 0 && inside((y - 1) * width + x)) !== (y < height && inside(y * width + x));
        if (edge && start < 0) start = x;
        if (!edge && start >= 0) {
          path += `M${start} ${y}H${x}`;
          start = -1;
        }
      }
    }
    for (let x = 0; x <= width; x++) {
      for (let y = 0, start = -1; y <= height; y++) {
        const edge = y < height && (x > 0 && inside(y * width + x - 1)) !== (x < width && inside(y * width + x));
        if (edge && start < 0) start = y;
        if (!edge && start >= 0) {
          path += `M${x} ${start}V${y}`;
          start = -1;
        }
      }
    }
    return path;
  }

  return { ERRORS, labels, confidence, errors, heat, proposals, borders, outline, distinct };
})();
