"use strict";
// Conveniences only; the page says everything without them: tooltips, highlighting, sorting, copying.

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);

function showTip(mark) {
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const place = mark.getBoundingClientRect();
  const left = Math.min(Math.max(8, place.left + place.width / 2 - tip.offsetWidth / 2), innerWidth - tip.offsetWidth - 8);
  const above = place.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : place.bottom + 8}px`;
}

function highlight(series) {
  document.body.classList.toggle("focused", series !== undefined);
  for (const mark of document.querySelectorAll("[data-series]")) {
    mark.classList.toggle("chosen", mark.dataset.series === series);
  }
}

for (const event of ["mouseover", "focusin"]) {
  document.addEventListener(event, ({ target }) => {
    const mark = target.closest("[data-tip]");
    if (mark) showTip(mark);
    else tip.hidden = true;
    highlight(target.closest("[data-series]")?.dataset.series);
  });
}
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// The tooltip replaces the browser's own.
for (const title of document.querySelectorAll("[data-tip] > title")) title.remove();

function sortBy(table, column, header) {
  const rising = header.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].map((row) => {
    const cell = row.cells[column];
    const number = parseFloat(cell.dataset.sort);
    return { row, number, text: cell.textContent, missing: cell.querySelector(".absent") !== null };
  });
  const sign = rising ? 1 : -1;
  rows.sort((a, b) => {
    if (a.missing !== b.missing) return a.missing ? 1 : -1; // what was not measured stays last
    return sign * (Number.isNaN(a.number) ? a.text.localeCompare(b.text) : a.number - b.number);
  });
  table.tBodies[0].append(...rows.map(({ row }) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(table, column, header));
    header.append(button);
  });
}

for (const command of document.querySelectorAll("pre.command")) {
  if (!navigator.clipboard) break;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(command.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  command.append(button);
}

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
