"use strict";
const drawings = JSON.parse(document.getElementById("drawings").textContent);
const root = document.documentElement;
const button = document.getElementById("theme");
const config = {
  responsive: true,
  displaylogo: false,
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  toImageButtonOptions: { format: "svg" },
};

function colour(name) {
  return getComputedStyle(root).getPropertyValue(name).trim();
}

function themed(layout) {
  const axes = {};
  for (const name of ["xaxis", "yaxis", "xaxis2", "yaxis2"]) {
    if (name in layout) {
      axes[name] = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--soft"), ...layout[name] };
    }
  }
  return {
    ...layout,
    ...axes,
    height: layout.small || 380,
    margin: { l: 56, r: 16, t: 28, b: 48 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--ink"), size: 13 },
    hoverlabel: { align: "left" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
  };
}

function draw(name) {
  const plot = document.getElementById(name);
  if (plot.offsetParent === null) return; // of a run that is not shown: drawn when it is
  const { traces, layout } = drawings[name];
  Plotly.react(plot, over(name, traces), themed(titled(name, layout)), config);
}

function drawAll() {
  Object.keys(drawings).forEach(draw);
}

function chosen(name) {
  return document.querySelector(`.switch[data-chart="${name}"] input:checked`);
}

function over(name, traces) {
  const unit = chosen(name);
  return unit ? traces.map((trace, place) => ({ ...trace, x: drawings[name].over[place][unit.value] })) : traces;
}

function titled(name, layout) {
  const unit = chosen(name);
  return unit ? { ...layout, xaxis: { ...layout.xaxis, title: { text: unit.dataset.title } } } : layout;
}

function setTheme(dark) {
  root.dataset.theme = dark ? "dark" : "light";
  button.textContent = dark ? "Light" : "Dark";
  button.setAttribute("aria-pressed", String(dark));
  drawAll();
}

button.addEventListener("click", () => setTheme(root.dataset.theme !== "dark"));
document.querySelectorAll(".switch input").forEach((input) => {
  input.addEventListener("change", () => draw(input.closest(".switch").dataset.chart));
});
const runs = document.getElementById("run");
if (runs) {
  runs.addEventListener("change", () => {
    document.querySelectorAll(".part").forEach((part) => {
      part.hidden = part.id !== `part-${runs.value}`;
    });
    drawAll();
  });
}
setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
