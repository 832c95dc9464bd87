// Elements, colours and the charts of the overview. Text from samples is only ever set as text.
const h = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (value !== null && value !== false) element.setAttribute(name, value);
  element.append(...children.flat().filter((child) => child !== null));
  return element;
};
const s = (tag, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.flat());
  return element;
};
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const count = (value) => Math.round(value).toLocaleString("en-US");
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
const short = (value) =>
  value >= 1e6 ? `${+(value / 1e6).toPrecision(3)}M` : value >= 1e4 ? `${+(value / 1e3).toPrecision(3)}k` : `${+value.toPrecision(3)}`;
const color = (number) => (number < 0 ? "c0" : `c${1 + (number % 7)}`);

const tip = document.getElementById("tip");
const showTip = (event, ...lines) => {
  tip.replaceChildren(...lines.filter(Boolean).map((line) => h("div", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - width - 8);
  const below = event.clientY + 18;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below + height > innerHeight - 8 ? Math.max(8, event.clientY - height - 12) : below}px`;
};
const hideTip = () => { tip.hidden = true; };
// The dialog lies above everything, so the tip must be inside it while it is open.
const liftTip = (parent) => parent.append(tip);

const figure = (name, unit, drawing) =>
  h("figure", { class: "chart card" }, h("figcaption", {}, h("b", {}, name), " ", h("span", { class: "unit" }, unit)), drawing);

const WIDTH = 520, HEIGHT = 190, LEFT = 46, BOTTOM = 24, TOP = 8;
const ticks = (high, wanted) => {
  const raw = high / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw) || 1;
  const whole = Math.max(1, step);
  return Array.from({ length: Math.floor(high / whole) + 1 }, (_, i) => i * whole);
};

// Stacked bars: counts[series][bin] over edges[bins + 1]; every `step` bins end at a round value. No names: one series.
const histogram = ({ edges, counts, step }, label, names) => {
  const totals = edges.slice(1).map((_, bin) => counts.reduce((sum, series) => sum + series[bin], 0));
  const high = Math.max(...totals), width = (WIDTH - LEFT - 8) / totals.length;
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / high);
  const marks = ticks(high, 4).map((value) => [
    s("line", { class: "grid", x1: LEFT, x2: WIDTH - 8, y1: y(value), y2: y(value) }),
    s("text", { class: "y", x: LEFT - 6, y: y(value) + 4 }, short(value)),
  ]);
  const every = step * Math.max(1, Math.ceil(totals.length / step / (innerWidth < 820 ? 6 : 11)));
  const words = edges.map((edge, i) =>
    i % every ? [] : s("text", { x: LEFT + i * width, y: HEIGHT - 8 }, label(edge)));
  const bars = totals.map((total, bin) => {
    let base = 0;
    const parts = counts.map((series, number) => {
      const top = y(base + series[bin]), height = y(base) - top;
      base += series[bin];
      return s("rect", { class: `fill ${color(names ? number : -1)}`, x: LEFT + bin * width + 0.75, y: top, width: Math.max(1, width - 1.5), height });
    });
    const hit = s("rect", { class: "hit", x: LEFT + bin * width, y: TOP, width, height: HEIGHT - TOP - BOTTOM });
    hit.addEventListener("mousemove", (event) =>
      showTip(event, `${label(edges[bin])} to ${label(edges[bin + 1])}: ${count(total)}`,
        ...(names ? counts.map((series, number) => series[bin] ? `${names[number]} ${count(series[bin])}` : "") : [])));
    hit.addEventListener("mouseleave", hideTip);
    return [...parts, hit];
  });
  return s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" }, marks.flat(), words.flat(), bars.flat());
};

// Sizes of pictures: a dot for each width and height, its area by how many there are. Both axes logarithmic.
const sizePlot = (cells, names) => {
  const values = cells.flatMap(([, w, hh]) => [w, hh]);
  const low = Math.log2(Math.min(...values)) - 0.3, high = Math.log2(Math.max(...values)) + 0.3;
  const x = (value) => LEFT + ((Math.log2(value) - low) / (high - low)) * (WIDTH - LEFT - 8);
  const y = (value) => TOP + (1 - (Math.log2(value) - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const most = Math.max(...cells.map(([, , , n]) => n));
  const powers = [];
  for (let power = Math.ceil(low); power <= high; power++) powers.push(2 ** power);
  const crowded = powers.length > 7;
  const grid = powers.map((value) => [
    s("line", { class: "grid", x1: LEFT, x2: WIDTH - 8, y1: y(value), y2: y(value) }),
    s("line", { class: "grid", x1: x(value), x2: x(value), y1: TOP, y2: HEIGHT - BOTTOM }),
    crowded && innerWidth < 820 && Math.log2(value) % 2 ? [] : s("text", { x: x(value), y: HEIGHT - 8 }, `${value}`),
    crowded && Math.log2(value) % 2 ? [] : s("text", { class: "y", x: LEFT - 6, y: y(value) + 4 }, `${value}`),
  ].flat());
  const dots = [...cells].sort((a, b) => b[3] - a[3]).map(([number, w, hh, n]) => {
    const dot = s("circle", { class: `dot ${color(number)}`, cx: x(w), cy: y(hh), r: 2 + 9 * Math.sqrt(n / most) });
    dot.addEventListener("mousemove", (event) => showTip(event, `${w} × ${hh} pixels: ${count(n)}`, names[number]));
    dot.addEventListener("mouseleave", hideTip);
    return dot;
  });
  return s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" }, grid.flat(), dots);
};

const drawMixture = (page) => {
  if (!page.mixture.length) return;
  const section = document.getElementById("mixture");
  section.hidden = false;
  section.querySelector(".tiles").append(...page.tiles.map(([name, value, note]) =>
    h("div", { class: "tile" }, h("h3", {}, name), h("p", {}, value), h("small", {}, note))));
  const samples = page.mixture.reduce((sum, row) => sum + row.samples, 0);
  const tokens = page.mixture.reduce((sum, row) => sum + row.tokens, 0);
  const share = (value, total, number) => h("td", { class: "share", title: `${percent(value / (total || 1))}` },
    h("i", { class: color(number), style: `width:${(100 * value) / (total || 1)}%` }), h("span", {}, percent(value / (total || 1))));
  const head = ["data set", "task", "samples", "", "tokens", "", "5%", "median", "95%", "longest"];
  const rows = page.mixture.map((row, i) => {
    const number = page.datasets.indexOf(row.dataset);
    const first = !i || page.mixture[i - 1].dataset !== row.dataset;
    return h("tr", {},
      h("td", {}, first ? h("i", { class: `swatch ${color(number)}` }) : "", first ? h("b", {}, row.dataset) : ""),
      h("td", {}, row.task), h("td", { class: "number" }, count(row.samples)), share(row.samples, samples, number),
      h("td", { class: "number" }, count(row.tokens)), share(row.tokens, tokens, number),
      [0, 1, 2, 3].map((i) => h("td", { class: "number" }, row.spread.length ? count(row.spread[i]) : "–")));
  });
  section.querySelector("table").append(
    h("thead", {}, h("tr", {}, head.map((name, i) => h("th", { class: i > 1 && name ? "number" : "" }, name)))),
    h("tbody", {}, rows));
};

const drawCharts = (page) => {
  const { lengths, seconds, sizes, fill } = page.charts;
  if (!lengths) return;
  const section = document.getElementById("lengths");
  section.hidden = false;
  section.querySelector(".legend").append(...page.datasets.map((name, number) =>
    h("li", {}, h("i", { class: `swatch ${color(number)}` }), name)));
  const seen = [figure("Tokens of a sample", "samples, by length", histogram(lengths, count, page.datasets))];
  if (sizes.length) seen.push(figure("Pictures and frames", "height over width, pixels as stored", sizePlot(sizes, page.datasets)));
  if (seconds) seen.push(figure("Clips", "by seconds", histogram(seconds, (value) => `${+value.toPrecision(2)}`, page.datasets)));
  if (fill) seen.push(figure("Fill", `packs, by per cent of ${count(page.capacity[0])} tokens`, histogram(fill, (edge) => `${edge}%`, null)));
  section.querySelector(".charts").append(...seen);
};
