// ---- The config, and the start of the page -------------------------------------------------------------------

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
