// Fills the galleries and the image browser of a report from the page's two JSON blocks, and filters its config.
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

const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}\u00a0%` : "-");

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

// A frame of a number of sigmas on both sides of every edge: the grown box minus the shrunk one.
function band(row, sigmas) {
  const [x1, y1, x2, y2] = row;
  const [a, b, c, d] = row.slice(SIGMA).map((sigma) => sigma * sigmas);
  const outer = rectangle(x1 - a, y1 - b, x2 + c, y2 + d);
  const hasInside = x1 + a < x2 - c && y1 + b < y2 - d;
  return hasInside ? outer + rectangle(x1 + a, y1 + b, x2 - c, y2 - d) : outer;
}

// Class and score of a box as text at its corner, at the first place that no label of a better box has taken.
function tagOf(row, [x, y, width, height], data, taken) {
  const size = Math.max(width, height) / 28;
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

// An SVG of a picture that fills `window` ([x, y, width, height], pixels of the file), and the boxes in it.
function drawPicture(uri, window, rows, objects, data, label, { tags }) {
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
    const group = svgElement("g", { class: `kind${row[KIND]}` });
    const sigma = sigmaOf(row, "px");
    const text = `${data.classes[row[CLASS]]} ${row[SCORE].toFixed(2)}`;
    const more = `${data.kinds[row[KIND]]}, IoU ${row[IOU].toFixed(2)}${sigma === null ? "" : `, sigma ${sigma.toFixed(1)} px`}`;
    group.append(svgElement("title", {}, `${text}: ${more}`));
    if (sigma !== null) {
      for (const sigmas of [2, 1]) {
        group.append(svgElement("path", { d: band(row, sigmas), class: `band${sigmas}`, "fill-rule": "evenodd" }));
      }
    }
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
      const caption = `${data.classes[row[CLASS]]} ${row[SCORE].toFixed(2)}, ${data.kinds[row[KIND]]}, IoU ${row[IOU].toFixed(2)}`;
      const sigma = row.length > SIGMA ? `, sigma ${row.slice(SIGMA).map((value) => value.toFixed(1)).join(" ")} px` : "";
      const picture = drawPicture(pictures.crops[item.crop], item.window, [row], item.objects, data, caption + sigma, { tags: false });
      const text = element("span", {}, caption + sigma);
      const where = `image ${item.id}`;
      // Images that are not in the browser only have a crop.
      const link = item.image === null ? where : element("a", { href: `#image=${item.image}` }, where);
      list.append(element("li", {}, picture, text, " ", link));
    }
  }
}

// ---- The image browser ---------------------------------------------------------------------------------------

function startBrowser(data, pictures) {
  const image = byId("image"), score = byId("score"), sigma = byId("sigma"), unit = byId("unit");
  const classes = byId("class"), objects = byId("objects");
  for (const [kind, name] of data.kinds.entries()) {
    const swatch = svgElement("svg", { viewBox: "0 0 26 10", "aria-hidden": "true", class: `kind${kind}` });
    swatch.append(svgElement("path", { d: "M1 5H25", class: "edge" }));
    byId("kinds").append(element("li", {}, swatch, name));
  }

  // The scale of the sigma filter; its largest value filters nothing.
  function scaleSigma() {
    if (!sigma) return;
    const limit = data.sigma_limits[unit.value];
    sigma.max = limit;
    sigma.step = unit.value === "px" ? 0.1 : 0.005;
    sigma.value = limit;
  }

  const hasLimit = () => sigma !== null && Number(sigma.value) < Number(sigma.max);

  function passes(row) {
    if (row[SCORE] < Number(score.value)) return false;
    if (classes.value !== "" && row[CLASS] !== Number(classes.value)) return false;
    const spread = hasLimit() ? sigmaOf(row, unit.value) : null;
    return spread === null || spread <= Number(sigma.value);
  }

  // Counts the boxes of a run that pass the filters, over all images.
  function countAll(run) {
    const sums = { shown: 0, boxes: 0, right: 0, counted: 0, objects: 0 };
    for (const entry of data.images) {
      for (const row of entry.found[run]) {
        sums.boxes++;
        if (!passes(row)) continue;
        sums.shown++;
        if (row[KIND] !== IGNORED) sums.counted++;
        if (row[KIND] === TRUE_POSITIVE) sums.right++;
      }
      for (const object of entry.objects) {
        if (!object[5] && (classes.value === "" || object[4] === Number(classes.value))) sums.objects++;
      }
    }
    return sums;
  }

  function showCount(run, rows, boxes) {
    const sums = countAll(run), place = document.querySelector(`[data-count="${run}"]`);
    Object.assign(place.dataset, { shown: rows.length, boxes, shownInAll: sums.shown, boxesInAll: sums.boxes });
    place.textContent =
      `${rows.length} of ${boxes} boxes in this image; ${sums.shown} of ${sums.boxes} in all ` +
      `${data.images.length} images. Of these ${percent(sums.right, sums.counted)} find an object ` +
      `(precision), and they find ${percent(sums.right, sums.objects)} of the objects (recall).`;
  }

  function tableOf(rows) {
    const edges = rows.some((row) => row.length > SIGMA) ? ["x1", "y1", "x2", "y2"].map((edge) => `\u03c3 ${edge}`) : [];
    const head = element("tr");
    for (const name of ["class", "kind", "score", "IoU", ...edges]) {
      head.append(element("th", { scope: "col", class: name === "kind" ? "text" : "" }, name));
    }
    const body = element("tbody");
    for (const row of rows) {
      const numbers = row.slice(SIGMA).map((value) => value.toFixed(1));
      const line = element("tr");
      line.append(element("th", { scope: "row" }, data.classes[row[CLASS]]));
      line.append(element("td", { class: "text" }, data.kinds[row[KIND]]));
      for (const text of [row[SCORE].toFixed(3), row[IOU].toFixed(2), ...numbers]) line.append(element("td", {}, text));
      body.append(line);
    }
    const table = element("table", { class: "numbers" }, element("thead", {}, head), body);
    return element("div", { class: "wide", role: "region", tabindex: "0", "aria-label": "Boxes" }, table);
  }

  function show() {
    const index = Number(image.value), entry = data.images[index];
    const id = entry.name === `${entry.id}` ? "" : ` (id ${entry.id})`;
    byId("image-shown").textContent = `${index + 1} of ${data.images.length}: ${entry.name}${id}`;
    byId("score-shown").textContent = Number(score.value).toFixed(2);
    if (sigma) byId("sigma-shown").textContent = hasLimit() ? `${Number(sigma.value)}` : "any";
    for (const run of data.runs.keys()) {
      const rows = entry.found[run].filter(passes);
      const truth = objects.checked ? entry.objects : [];
      const label = `${entry.name} with ${rows.length} boxes of ${data.runs[run].label}`;
      const picture = drawPicture(pictures.images[index], [0, 0, ...entry.size], rows, truth, data, label, { tags: true });
      document.querySelector(`[data-picture="${run}"]`).replaceChildren(picture);
      document.querySelector(`[data-rows="${run}"]`).replaceChildren(tableOf(rows));
      showCount(run, rows, entry.found[run].length);
    }
  }

  function step(by) {
    image.value = Number(image.value) + by; // the input keeps it in its range
    show();
  }

  // A link can set the browser: #image=3&score=0.9&unit=px&sigma=2&class=1
  function readAddress() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    if (unit && wanted.has("unit")) {
      unit.value = wanted.get("unit") === "px" ? "px" : "relative";
      scaleSigma();
    }
    for (const input of [image, score, sigma, classes]) {
      if (input && wanted.has(input.id)) input.value = wanted.get(input.id);
    }
    show();
    if (wanted.has("image")) byId("browser").scrollIntoView();
  }

  scaleSigma();
  readAddress();
  window.addEventListener("hashchange", readAddress);
  byId("filters").addEventListener("input", (event) => {
    if (event.target === unit) scaleSigma();
    show();
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  document.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    // Inputs and scrolling regions use the arrow keys themselves.
    const isTaken = event.target.closest("input, select, textarea, .wide") !== null;
    if (!by || isTaken || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    step(by);
  });
}

// ---- The config ----------------------------------------------------------------------------------------------

function startConfig() {
  const filter = byId("config-filter"), only = byId("only-differences");
  const rows = [...document.querySelectorAll("#config-table tbody tr")];
  const update = () => {
    const text = filter.value.trim().toLowerCase();
    for (const row of rows) {
      const isWanted = row.textContent.toLowerCase().includes(text);
      row.hidden = !isWanted || (only !== null && only.checked && !row.classList.contains("differs"));
    }
    byId("config-count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };
  filter.form.addEventListener("input", update);
  filter.form.addEventListener("submit", (event) => event.preventDefault());
  update();
}

startConfig();
if (byId("data") !== null) {
  const data = JSON.parse(byId("data").textContent);
  const pictures = JSON.parse(byId("pictures").textContent);
  fillGalleries(data, pictures);
  startBrowser(data, pictures);
}
// Time until the page was ready, in milliseconds, for measurements.
document.documentElement.dataset.readyMs = Math.round(performance.now());
