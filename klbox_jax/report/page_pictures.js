// Draws pictures with boxes, and fills the galleries.
// A row of a detection is [x1, y1, x2, y2, score, class, kind, iou, s1, s2, s3, s4], without the last four if the run
// has no sigmas; a row of a true box is [x1, y1, x2, y2, class, is_crowd]. All text is inserted as text, never as HTML.
"use strict";

const byId = (id) => document.getElementById(id);
const SCORE = 4, CLASS = 5, KIND = 6, IOU = 7, SIGMA = 8;
const TRUE_POSITIVE = 0, IGNORED = 4;

// ---- Small helpers -------------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svgElement(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Mean sigma of the four edges, in pixels or as a share of the side across each edge (1 px at least).
function sigmaOf(row, unit) {
  if (row.length <= SIGMA) return null;
  const width = Math.max(row[2] - row[0], 1), height = Math.max(row[3] - row[1], 1);
  const sides = unit === "px" ? [1, 1, 1, 1] : [width, height, width, height];
  let sum = 0;
  for (let edge = 0; edge < 4; edge++) sum += row[SIGMA + edge] / sides[edge];
  return sum / 4;
}

// ---- Drawing -------------------------------------------------------------------------------------------------

const rectangle = (x1, y1, x2, y2) => `M${x1} ${y1}H${x2}V${y2}H${x1}Z`;

// The outer border and the inner border ("" if they meet) of a band of a number of sigmas around every edge.
function bandBorders(row, sigmas) {
  const [x1, y1, x2, y2] = row;
  const [a, b, c, d] = row.slice(SIGMA).map((sigma) => sigma * sigmas);
  const hasInside = x1 + a < x2 - c && y1 + b < y2 - d;
  return [rectangle(x1 - a, y1 - b, x2 + c, y2 + d), hasInside ? rectangle(x1 + a, y1 + b, x2 - c, y2 - d) : ""];
}

// The share of a box that is within two sigma of one of its edges.
function coveredShare(row) {
  const width = row[2] - row[0], height = row[3] - row[1];
  const [a, b, c, d] = row.slice(SIGMA).map((sigma) => 2 * sigma);
  return width > 0 && height > 0 ? 1 - (Math.max(width - a - c, 0) * Math.max(height - b - d, 0)) / (width * height) : 1;
}

// The bands of one and two sigma. The more of the box they cover, the fainter they are: a small object stays visible.
function drawBands(row, style) {
  if (style === "none") return [];
  if (style === "outlines") {
    return [svgElement("path", { d: bandBorders(row, 2).join(""), class: "border" })];
  }
  const bands = svgElement("g", { opacity: (1 - 0.7 * coveredShare(row)).toFixed(2) });
  for (const sigmas of [2, 1]) {
    bands.append(svgElement("path", { d: bandBorders(row, sigmas).join(""), class: `band${sigmas}`, "fill-rule": "evenodd" }));
  }
  return [bands];
}

// Class and score of a box as text at its corner, at the first place that no label of a better box has taken.
function tagOf(row, [x, y, width, height], data, taken) {
  const size = Math.max(width, height) / 32;
  const text = `${data.classes[row[CLASS]]} ${row[SCORE].toFixed(2)}`;
  const length = 0.55 * size * text.length; // accurate enough, and known without a layout pass
  const left = Math.max(x, Math.min(row[0], x + width - length));
  const isFree = (top) => taken.every((tag) =>
    Math.abs(Number(tag.dataset.top) - top) > size || left > Number(tag.dataset.end) || left + length < Number(tag.dataset.left));
  const places = [row[1] - 0.3 * size, row[3] + size, row[1] + size, row[3] - 0.3 * size]
    .map((top) => Math.max(y + size, Math.min(top, y + height - 0.3 * size)));
  const top = places.find(isFree) ?? places[0];
  const tag = svgElement("text", { x: left, y: top, "font-size": size, class: "tag" }, text);
  Object.assign(tag.dataset, { top, left, end: left + length });
  return tag;
}

function describe(row, data) {
  const sigma = sigmaOf(row, "px");
  return `${data.classes[row[CLASS]]} ${row[SCORE].toFixed(2)}: ${data.kinds[row[KIND]]}, IoU ${row[IOU].toFixed(2)}` +
    (sigma === null ? "" : `, mean sigma ${sigma.toFixed(1)} px`);
}

// An SVG of a picture that fills `window` ([x, y, width, height], pixels of the file), and the boxes in it.
function drawPicture(uri, window, rows, objects, data, label, { tags, bands }) {
  const [x, y, width, height] = window, viewBox = window.join(" ");
  const outer = svgElement("svg", { viewBox, role: "img", "aria-label": label, class: "picture" });
  // The inner one clips everything outside the picture.
  const picture = svgElement("svg", { viewBox, x, y, width, height });
  outer.append(picture);
  picture.append(svgElement("image", { href: uri, x, y, width, height, preserveAspectRatio: "none" }));
  for (const object of objects) {
    const path = rectangle(...object.slice(0, 4));
    const title = svgElement("title", {}, `true ${data.classes[object[4]]}${object[5] ? ", crowd" : ""}`);
    picture.append(svgElement("path", { d: path, class: "casing" }), svgElement("path", { d: path, class: "truth" }, title));
  }
  // Best scores are drawn on top.
  for (const row of [...rows].reverse()) {
    const group = svgElement("g", { class: `kind${row[KIND]}` }, svgElement("title", {}, describe(row, data)));
    if (row.length > SIGMA) group.append(...drawBands(row, bands));
    const path = rectangle(...row.slice(0, 4));
    group.append(svgElement("path", { d: path, class: "casing" }), svgElement("path", { d: path, class: "edge" }));
    picture.append(group);
  }
  if (tags) picture.append(...rows.reduce((made, row) => [...made, tagOf(row, window, data, made)], []));
  return outer;
}

function fillGalleries(data, pictures) {
  for (const list of document.querySelectorAll("[data-gallery]")) {
    for (const item of data.galleries[Number(list.dataset.gallery)].items) {
      const row = item.row;
      const sigmas = row.length > SIGMA ? `, sigmas ${row.slice(SIGMA).map((value) => value.toFixed(1)).join(" ")} px` : "";
      const caption = `${data.classes[row[CLASS]]} ${row[SCORE].toFixed(2)}, ${data.kinds[row[KIND]]}, IoU ${row[IOU].toFixed(2)}${sigmas}`;
      const style = { tags: false, bands: "filled" };
      const picture = drawPicture(pictures.crops[item.crop], item.window, [row], item.objects, data, caption, style);
      const link = element("a", { href: `#image=${item.image}` }, `image ${item.id}`);
      list.append(element("li", {}, picture, element("span", {}, caption), " ", link));
    }
  }
}

