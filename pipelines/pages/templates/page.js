"use strict";

// Charts, in the colours of the page. Without a list of buttons, Plotly has one that sends the data to its makers.
const charts = JSON.parse(document.getElementById("charts").textContent);

function draw() {
  const axis = { gridcolor: "#8883", zerolinecolor: "#8885", linecolor: "#8888" };
  const colors = { font: { color: getComputedStyle(document.body).color }, paper_bgcolor: "transparent", plot_bgcolor: "transparent" };
  const modebar = { bgcolor: "transparent" };
  const template = { layout: { ...colors, modebar, xaxis: axis, yaxis: axis } };
  for (const box of document.querySelectorAll(".chart")) {
    const { data, layout } = charts[box.dataset.chart];
    Plotly.react(box, data, { ...layout, template }, { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] });
  }
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// Tables: a click on a heading sorts, with missing values last; a field above the table filters its rows.
function compare(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
}

function sort(table, heading) {
  const sign = heading.ariaSort === "ascending" ? -1 : 1;
  for (const other of heading.parentNode.cells) other.ariaSort = null;
  heading.ariaSort = sign > 0 ? "ascending" : "descending";
  const value = (row) => row.cells[heading.cellIndex].dataset.value;
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), sign)));
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const heading of table.tHead.rows[0].cells) heading.addEventListener("click", () => sort(table, heading));
  if (table.tBodies[0].rows.length < 8) continue; // nothing to search
  const field = Object.assign(document.createElement("input"), { type: "search", placeholder: "filter rows" });
  field.addEventListener("input", () => {
    const text = field.value.toLowerCase();
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(text);
  });
  table.parentNode.before(field);
}

// Pictures: a click shows one at twice its size.
const dialog = document.querySelector("dialog");
for (const picture of document.querySelectorAll("img")) {
  if (dialog.contains(picture)) continue;
  picture.addEventListener("click", () => {
    const large = dialog.firstElementChild;
    Object.assign(large, { src: picture.src, alt: picture.alt, width: 2 * picture.width });
    dialog.showModal();
  });
}
dialog.addEventListener("click", () => dialog.close());
