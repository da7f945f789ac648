"use strict";

/* Sorting: a click on a heading, numbers by value, what has none last. */
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th");
    if (!heading || !event.target.closest("button")) return;
    const place = heading.cellIndex;
    const words = heading.dataset.kind === "text";
    const descending = heading.hasAttribute("aria-sort") ? heading.ariaSort === "ascending" : !words;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => row.cells[place].dataset.value;
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = words ? (a < b ? -1 : Number(a > b)) : Number(a) - Number(b);
      return descending ? -order : order;
    });
    body.append(...rows);
  });
}

/* Filtering: by method and budget, in tables, figures and pictures alike. */
for (const study of document.querySelectorAll(".study")) {
  const chips = [...study.querySelectorAll(".chip")];
  const budget = study.querySelector("[data-budget-select]");
  const reset = study.querySelector("[data-reset]");
  if (!budget) continue;
  const update = () => {
    const off = new Set(chips.filter((chip) => chip.ariaPressed === "false").map((chip) => chip.dataset.series));
    const wanted = budget.value;
    const gone = (part) =>
      off.has(part.dataset.series) ||
      (wanted !== "" && part.dataset.budget !== undefined && part.dataset.budget !== "0" && part.dataset.budget !== wanted);
    for (const part of study.querySelectorAll("tr[data-series], .kept [data-series]")) part.hidden = gone(part);
    for (const part of study.querySelectorAll("svg.chart [data-series]")) part.classList.toggle("gone", gone(part));
    for (const level of study.querySelectorAll(".level")) level.hidden = !level.querySelector("[data-series]:not([hidden])");
    reset.hidden = !off.size && wanted === "";
  };
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      chip.ariaPressed = chip.ariaPressed === "true" ? "false" : "true";
      update();
    });
  }
  budget.addEventListener("change", update);
  reset.addEventListener("click", () => {
    for (const chip of chips) chip.ariaPressed = "true";
    budget.value = "";
    update();
  });
}

/* Light and dark: as the system has it, until the button is used. */
document.querySelector("[data-theme-toggle]").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
