"use strict";
// Draws the figures in the page's colors, sorts tables, and hides arms.
const hidden = new Set();
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = [...document.querySelectorAll(".plot")];

function theme() {
  const css = getComputedStyle(document.documentElement);
  const color = (name) => css.getPropertyValue(name).trim();
  const axis = { gridcolor: color("--grid"), linecolor: color("--muted"),
    tickcolor: color("--muted"), tickfont: { color: color("--text") } };
  return { layout: {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 13,
      color: color("--text") },
    hoverlabel: { bgcolor: color("--page"), bordercolor: color("--muted"), align: "left",
      namelength: -1, font: { color: color("--text") } },
  } };
}

let drawing = 0;

// One figure at a time, so that the page answers while it draws.
async function draw() {
  const turn = ++drawing;
  for (const plot of plots) {
    await new Promise((resolve) => setTimeout(resolve));
    if (turn !== drawing) return;
    const { data, layout } = figures[plot.dataset.figure];
    const shown = data.map((trace) => ({ ...trace, visible: !hidden.has(trace.meta) }));
    await Plotly.react(plot, shown, { ...layout, template: theme() },
      { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

function hide(arm, off) {
  if (off) hidden.add(arm); else hidden.delete(arm);
  for (const element of document.querySelectorAll("[data-arm]"))
    if (element.dataset.arm === arm) {
      if (element.matches("button")) element.setAttribute("aria-pressed", String(!off));
      else element.hidden = off;
    }
  draw();
}

// The first number of a cell; cells without one come last in either order.
function numberIn(cell) {
  const found = /^[-+]?[\d,]*\.?\d+(e[-+]?\d+)?/.exec(cell.textContent.trim());
  return found ? Number(found[0].replaceAll(",", "")) : NaN;
}

function sort(table, column, descending) {
  const body = table.tBodies[0];
  const sign = descending ? -1 : 1;
  const numeric = [...body.rows].some((row) => !Number.isNaN(numberIn(row.cells[column])));
  body.append(...[...body.rows].sort((one, other) => {
    const [a, b] = [one.cells[column], other.cells[column]];
    if (!numeric) return sign * a.textContent.localeCompare(b.textContent);
    const [x, y] = [numberIn(a), numberIn(b)];
    return Number.isNaN(x) - Number.isNaN(y) || (Number.isNaN(x) ? 0 : sign * (x - y));
  }));
  [...table.tHead.rows[0].cells].forEach((head, place) =>
    head.setAttribute("aria-sort",
      place !== column ? "none" : descending ? "descending" : "ascending"));
}

for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () =>
    sort(table, column, head.getAttribute("aria-sort") !== "descending")));
  // On a phone a row is a card, without a header to click on.
  const choice = table.closest(".table").querySelector("select");
  choice.addEventListener("change", () => sort(table, Number(choice.value), true));
}

for (const button of document.querySelectorAll("button[data-arm]"))
  button.addEventListener("click", () =>
    hide(button.dataset.arm, button.getAttribute("aria-pressed") === "true"));

draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
