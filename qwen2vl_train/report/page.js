"use strict";
// Everything is in the page already; the script only shows, hides and repeats it.
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const press = (button) => {
  for (const other of button.parentElement.querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
};

// Pictures: keep the cards that match every chosen value.
const filter = () => {
  const chosen = all("[data-filter][aria-pressed=true]").map((button) => button.dataset);
  const cards = all("article[data-stage]");
  for (const card of cards)
    card.hidden = !chosen.every(({ filter, value }) => value === "all" || card.dataset[filter] === value);
  const shown = cards.filter((card) => !card.hidden);
  const right = shown.filter((card) => card.dataset.answer === "right").length;
  const output = document.querySelector(".shown");
  if (output) output.textContent = `${shown.length} of ${cards.length} answers shown, ${right} right`;
};
for (const button of all("[data-filter]"))
  button.addEventListener("click", () => { press(button); filter(); });
filter();

// Curves: one view at a time.
for (const button of all("button[data-view]"))
  button.addEventListener("click", () => {
    press(button);
    for (const view of all("div[data-view]")) view.hidden = view.dataset.view !== button.dataset.view;
  });

for (const chart of all("figure.chart")) {
  // The hovered column's step beside the chart's name and its values in the legend; the last values again afterwards.
  const readout = chart.querySelector(".readout");
  const values = all(".legend [data-series] span", chart).map((span) => [span, span.textContent]);
  const show = (column) => {
    const [step, ...lines] = column ? column.textContent.split("\n") : [""];
    readout.textContent = step;
    for (const [span, last] of values) {
      const start = `${span.parentElement.dataset.series} `;
      const line = lines.find((line) => line.startsWith(start));
      span.textContent = column ? (line ? line.slice(start.length).split(" (")[0] : "") : last;
    }
  };
  if (readout) {
    chart.addEventListener("mouseover", ({ target }) => show(target.closest(".hit")));
    chart.addEventListener("mouseleave", () => show(null));
  }
  // A legend's entry switches its marks off and on.
  for (const button of all("button[data-series]", chart))
    button.addEventListener("click", () => {
      const off = button.classList.toggle("off");
      for (const mark of all("svg [data-series]", chart))
        if (mark.dataset.series === button.dataset.series) mark.style.visibility = off ? "hidden" : "";
    });
}
