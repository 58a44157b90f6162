"use strict";
/* A line drawn freely around points of a canvas. */

Report.Lasso = class {
  constructor() {
    this.line = [];
  }

  /** Begin or go on at a point of the canvas, in CSS pixels. */
  add(x, y) {
    const last = this.line.at(-1);
    if (!last || Math.hypot(x - last[0], y - last[1]) > 2) this.line.push([x, y]);
  }

  /** Return whether a point lies inside the closed line: a ray to the right crosses it an odd number of times. */
  holds(x, y) {
    let isInside = false;
    for (let i = 0, j = this.line.length - 1; i < this.line.length; j = i++) {
      const [[ax, ay], [bx, by]] = [this.line[i], this.line[j]];
      if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) isInside = !isInside;
    }
    return isInside;
  }

  draw(ink, colour) {
    if (this.line.length < 2) return;
    ink.beginPath();
    for (const [x, y] of this.line) ink.lineTo(x, y);
    ink.closePath();
    ink.strokeStyle = ink.fillStyle = colour;
    ink.lineWidth = 1.5;
    ink.stroke();
    ink.globalAlpha = 0.12;
    ink.fill();
    ink.globalAlpha = 1;
  }
};
