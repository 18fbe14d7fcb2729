// ---- The image browser: filters, pictures, and the list of all images -----------------------------------------

// Filters of the boxes, as set by the controls.
function boxFilters(data) {
  const score = byId("score"), sigma = byId("sigma"), unit = byId("unit"), classes = byId("class");
  const hasLimit = () => sigma !== null && Number(sigma.value) < Number(sigma.max);
  return {
    // Sets the scale of the sigma filter; its largest value filters nothing.
    scaleSigma() {
      if (!sigma) return;
      const limit = data.sigma_limits[unit.value];
      sigma.max = limit;
      sigma.step = unit.value === "px" ? 0.1 : 0.005;
      sigma.value = limit;
    },
    passes(row) {
      if (row[SCORE] < Number(score.value)) return false;
      if (classes.value !== "" && row[CLASS] !== Number(classes.value)) return false;
      const spread = hasLimit() ? sigmaOf(row, unit.value) : null;
      return spread === null || spread <= Number(sigma.value);
    },
    isWanted: (object) => !object[5] && (classes.value === "" || object[4] === Number(classes.value)),
    show() {
      byId("score-shown").textContent = Number(score.value).toFixed(2);
      if (!sigma) return;
      byId("sigma-shown").textContent = hasLimit() ? `${Number(sigma.value)}${unit.value === "px" ? " px" : ""}` : "any";
      sigma.setAttribute("aria-valuetext", byId("sigma-shown").textContent);
    },
  };
}

// Counts of the boxes of one image and run that pass the filters.
function countImage(entry, run, filters) {
  const counts = { shown: 0, right: 0, counted: 0, objects: 0, boxes: entry.found[run].length, sigma: 0 };
  for (const row of entry.found[run]) {
    if (!filters.passes(row)) continue;
    counts.shown++;
    if (row[KIND] !== IGNORED) counts.counted++;
    if (row[KIND] === TRUE_POSITIVE) counts.right++;
    counts.sigma += sigmaOf(row, "px") ?? 0;
  }
  for (const object of entry.objects) if (filters.isWanted(object)) counts.objects++;
  return counts;
}

const ORDERS = {
  false: (runs) => sum(runs, (counts) => counts.counted - counts.right),
  missed: (runs) => sum(runs, (counts) => counts.objects - counts.right),
  sigma: (runs) => sum(runs, (counts) => (counts.shown ? counts.sigma / counts.shown : 0)),
  difference: (runs) => Math.abs(runs[0].right - runs[1].right) + Math.abs(runs[0].counted - runs[1].counted) / 1000,
};

function sum(values, of) {
  return values.reduce((total, value) => total + of(value), 0);
}

const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}\u00a0%` : "-");

// The list of all images as buttons with small pictures. One of them is in the tab order; arrow keys move in the list.
class Grid {
  constructor(data, pictures, choose) {
    this.list = byId("grid");
    this.data = data;
    this.choose = choose;
    this.order = data.images.map((_, index) => index);
    const watcher = new IntersectionObserver((seen) => {
      for (const { target, isIntersecting } of seen) {
        if (!isIntersecting) continue;
        target.src = pictures.images[Number(target.dataset.index)];
        watcher.unobserve(target);
      }
    }, { root: this.list, rootMargin: "200px" });
    this.items = data.images.map((entry, index) => {
      const image = element("img", { alt: "", "data-index": index });
      watcher.observe(image);
      const button = element("button", { type: "button", tabindex: "-1" }, image, element("span", {}, entry.name), element("small"));
      button.addEventListener("click", () => this.choose(index));
      const item = element("li", {}, button);
      this.list.append(item);
      return item;
    });
    this.list.addEventListener("keydown", (event) => this.onKey(event));
  }

  // Shows the images that match, in the chosen order. `counts` has the counts of each image and run.
  update(counts) {
    const text = byId("find").value.trim().toLowerCase(), key = ORDERS[byId("order").value];
    const needsClass = byId("class").value !== "";
    const isMatch = (index) => {
      const entry = this.data.images[index];
      if (needsClass && !counts[index].some((one) => one.shown || one.objects)) return false;
      return `${entry.name} ${entry.id}`.toLowerCase().includes(text);
    };
    this.order = this.data.images.map((_, index) => index).filter(isMatch);
    if (key) {
      const values = counts.map(key);
      this.order.sort((a, b) => values[b] - values[a] || a - b);
    }
    const shown = new Set(this.order);
    for (const [index, item] of this.items.entries()) {
      item.hidden = !shown.has(index);
      const texts = counts[index].map((one) => `${one.right} of ${one.objects} found, ${one.counted - one.right} false`);
      item.querySelector("small").textContent =
        texts.map((line, run) => (texts.length > 1 ? `${this.data.runs[run].label}: ${line}` : line)).join("; ");
    }
    this.list.append(...this.order.map((index) => this.items[index]));
    byId("grid-count").textContent = this.order.length
      ? `${this.order.length} of ${this.data.images.length} images match.`
      : "No image matches; change the name or the class.";
  }

  mark(index) {
    for (const [other, item] of this.items.entries()) {
      const button = item.firstChild, isCurrent = other === index;
      button.tabIndex = isCurrent ? 0 : -1;
      if (isCurrent) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    // Scrolls the list only, not the page.
    const item = this.items[index], top = item.offsetTop - this.list.offsetTop;
    if (top < this.list.scrollTop || top + item.offsetHeight > this.list.scrollTop + this.list.clientHeight) {
      this.list.scrollTop = top;
    }
  }

  columns() {
    const tops = this.order.map((index) => this.items[index].offsetTop);
    const first = tops.findIndex((top) => top !== tops[0]);
    return first < 0 ? Math.max(tops.length, 1) : first;
  }

  onKey(event) {
    const place = this.order.findIndex((index) => this.items[index].contains(event.target));
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns(), ArrowDown: this.columns() };
    const ends = { Home: 0, End: this.order.length - 1 };
    const wanted = ends[event.key] ?? place + (steps[event.key] ?? NaN);
    if (place < 0 || event.altKey || event.ctrlKey || event.metaKey || !(wanted in this.order)) return;
    event.preventDefault();
    event.stopPropagation();
    this.choose(this.order[wanted]);
    this.items[this.order[wanted]].firstChild.focus({ preventScroll: true });
  }
}

function tableOf(rows, data) {
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

function startBrowser(data, pictures) {
  const image = byId("image"), unit = byId("unit"), objects = byId("objects"), bands = byId("bands");
  const filters = boxFilters(data);
  let current = 0, counts = [];
  const grid = new Grid(data, pictures, (index) => choose(index));
  for (const [kind, name] of data.kinds.entries()) {
    const swatch = svgElement("svg", { viewBox: "0 0 26 10", "aria-hidden": "true", class: `kind${kind}` });
    swatch.append(svgElement("path", { d: "M1 5H25", class: "edge" }));
    byId("kinds").append(element("li", {}, swatch, name));
  }

  function showCounts(run) {
    const sample = counts.filter((_, index) => !data.images[index].extra).map((of) => of[run]);
    const total = (key) => sum(sample, (one) => one[key]);
    const own = counts[current][run], place = document.querySelector(`[data-count="${run}"]`);
    Object.assign(place.dataset, { shown: own.shown, shownInAll: total("shown") });
    place.textContent =
      `${own.shown} of ${own.boxes} boxes in this image, ${total("shown")} of ${total("boxes")} in ${sample.length} ` +
      `images. Of these, ${percent(total("right"), total("counted"))} find an object (precision); they find ` +
      `${percent(total("right"), total("objects"))} of the objects (recall).`;
  }

  function showImage() {
    const entry = data.images[current], place = grid.order.indexOf(current);
    const id = entry.name === `${entry.id}` ? "" : ` (id ${entry.id})`;
    image.max = Math.max(grid.order.length - 1, 0);
    image.value = Math.max(place, 0);
    byId("image-shown").textContent =
      `${place < 0 ? "not in the list" : `${place + 1} of ${grid.order.length}`}: ${entry.name}${id}`;
    image.setAttribute("aria-valuetext", byId("image-shown").textContent);
    for (const run of data.runs.keys()) {
      const rows = entry.found[run].filter(filters.passes);
      const truth = objects.checked ? entry.objects : [];
      const label = `${entry.name} with ${rows.length} boxes of ${data.runs[run].label}`;
      const style = { tags: true, bands: bands ? bands.value : "none" };
      const picture = drawPicture(pictures.images[current], [0, 0, ...entry.size], rows, truth, data, label, style);
      document.querySelector(`[data-picture="${run}"]`).replaceChildren(picture);
      document.querySelector(`[data-rows="${run}"]`).replaceChildren(tableOf(rows, data));
      showCounts(run);
    }
    grid.mark(current);
  }

  function choose(index) {
    current = index;
    showImage();
  }

  // Applies the filters to all images; goes to the first image of the list if the current one is not in it any more.
  function update() {
    filters.show();
    counts = data.images.map((entry) => [...data.runs.keys()].map((run) => countImage(entry, run, filters)));
    grid.update(counts);
    if (grid.order.length && !grid.order.includes(current)) current = grid.order[0];
    showImage();
  }

  function step(by) {
    const wanted = grid.order[grid.order.indexOf(current) + by];
    if (wanted !== undefined) choose(wanted);
  }

  // A link can set the browser: #image=3&score=0.9&unit=px&sigma=2&class=1&find=name&order=false
  function readAddress() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    if (unit && wanted.has("unit")) {
      unit.value = wanted.get("unit") === "px" ? "px" : "relative";
      filters.scaleSigma();
    }
    for (const id of ["score", "sigma", "class", "find", "order", "bands"]) {
      if (byId(id) && wanted.has(id)) byId(id).value = wanted.get(id);
    }
    const index = Number(wanted.get("image") ?? current);
    if (index in data.images) current = index;
    if (wanted.has("image") && !wanted.has("find")) byId("find").value = ""; // so that the image is in the list
    if (wanted.has("image") && !wanted.has("class")) byId("class").value = "";
    update();
    if (wanted.has("image")) byId("browser").scrollIntoView();
  }

  filters.scaleSigma();
  readAddress();
  window.addEventListener("hashchange", readAddress);
  // A link to the address that is already shown gives no event of its own.
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#image=']");
    if (link !== null && link.getAttribute("href") === location.hash) readAddress();
  });
  byId("filters").addEventListener("input", (event) => {
    if (event.target === image) {
      choose(grid.order[Number(image.value)] ?? current);
      return;
    }
    if (event.target === unit) filters.scaleSigma();
    update();
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

