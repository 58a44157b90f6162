"use strict";
/* IoU of each image from the non-zero cells of its confusion matrix (truth * labels + predicted). */

Report.scores = (() => {
  /** Return labels (label -> {hit, truth, predicted, iou}), miou and wrong of an image in percent; null if unscored. */
  function ofImage([cells, counts]) {
    const { classes, has_background: background, ignore_uncovered: ignore } = Report.get("summary");
    const numLabels = classes.length;
    const labels = new Map();
    const entry = (label) => {
      if (!labels.has(label)) labels.set(label, { hit: 0, truth: 0, predicted: 0, iou: null });
      return labels.get(label);
    };
    let [total, hits] = [0, 0];
    for (let i = 0; i < cells.length; i++) {
      const truth = Math.floor(cells[i] / numLabels);
      const predicted = cells[i] % numLabels;
      // If label 0 is no class, a pixel predicted 0 is uncovered: wrong, or ignored if so configured.
      if (!background && (truth === 0 || (predicted === 0 && ignore))) continue;
      total += counts[i];
      if (truth === predicted) {
        hits += counts[i];
        entry(truth).hit += counts[i];
      }
      entry(truth).truth += counts[i];
      if (background || predicted > 0) entry(predicted).predicted += counts[i];
    }
    if (!total) return null;
    let sum = 0;
    for (const value of labels.values()) {
      value.iou = (100 * value.hit) / (value.truth + value.predicted - value.hit);
      sum += value.iou;
    }
    return { labels, miou: sum / labels.size, wrong: 100 * (1 - hits / total), total };
  }

  /** Return the scores of every image of a column, computed once. */
  const computed = new Map();
  function all(column = "cells") {
    if (!computed.has(column)) {
      const cells = Report.get("images")[column];
      computed.set(column, cells ? cells.map(ofImage) : null);
    }
    return computed.get(column);
  }

  /** Return the pixels of one cell of an image's confusion matrix. */
  function cell(index, truth, predicted) {
    const [cells, counts] = Report.get("images").cells[index];
    const at = cells.indexOf(truth * Report.get("summary").classes.length + predicted);
    return at < 0 ? 0 : counts[at];
  }

  /** Return the wrong pixels of an image of one kind, `missed`, `extra` or `confused`; of one label unless `null`. */
  function errorPixels(index, kind, label = null) {
    const [cells, counts] = Report.get("images").cells[index];
    const numLabels = Report.get("summary").classes.length;
    let pixels = 0;
    for (let i = 0; i < cells.length; i++) {
      const [truth, predicted] = [Math.floor(cells[i] / numLabels), cells[i] % numLabels];
      if (truth === predicted || (label !== null && label !== truth && label !== predicted)) continue;
      if (kind === (predicted === 0 ? "missed" : truth === 0 ? "extra" : "confused")) pixels += counts[i];
    }
    return pixels;
  }

  /** Return the labels of an image with their pixels, most first; unscored images give those of the prediction. */
  function present(index) {
    const score = all()?.[index];
    if (score)
      return [...score.labels].map(([label, v]) => [label, Math.max(v.truth, v.predicted)]).sort((a, b) => b[1] - a[1]);
    return [...Report.get("images").areas[index]].sort((a, b) => b[1] - a[1]);
  }

  return { ofImage, all, cell, errorPixels, present };
})();
