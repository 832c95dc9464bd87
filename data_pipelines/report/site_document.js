// One document: its media with boxes and token grid on the left, its tokens on the right.

// Details come as scripts beside the page, since a page opened from disk may fetch nothing: data/00003.js calls chunk(3, …).
const chunks = new Map();
const waiting = new Map();
const chunk = (number, documents) => { chunks.set(number, documents); };
const details = ({ chunk: number, place }) => {
  if (chunks.has(number)) return Promise.resolve(chunks.get(number)[place]);
  if (!waiting.has(number))
    waiting.set(number, new Promise((resolve, reject) => {
      const script = h("script", { src: `data/${String(number).padStart(5, "0")}.js` });
      script.onload = () => resolve();
      script.onerror = () => { waiting.delete(number); reject(new Error(`data/${String(number).padStart(5, "0")}.js is missing: keep the page's folder whole`)); };
      document.head.append(script);
    }));
  return waiting.get(number).then(() => chunks.get(number)[place]);
};

// Boxes and quads: corners on the grid of 1,000, each at the middle of its cell as the model's answers are read back.
const outline = (points) =>
  (points.length === 2 ? [points[0], [points[1][0], points[0][1]], points[1], [points[0][0], points[1][1]]] : points)
    .map(([x, y]) => `${x + 0.5},${y + 0.5}`).join(" ");
const boxLayer = (boxes, named = true) =>
  s("svg", { class: "boxes", viewBox: "0 0 1000 1000", preserveAspectRatio: "none" },
    boxes.map((box, i) => [
      s("polygon", { class: "rim", points: outline(box.points || box) }),
      s("polygon", { class: `box ${color(i)}`, "data-box": i, points: outline(box.points || box) }, named ? s("title", {}, box.phrase || "box") : []),
    ]).flat());

const position = (value) => (Array.isArray(value) ? `t ${value[0]}, h ${value[1]}, w ${value[2]}` : `t ${value}, h ${value}, w ${value}`);

// The cell under the mouse as the token it becomes: row i, column j of temporal step k.
const tokenLayer = (item, k, mark) => {
  const [rows, columns] = [item.h.length, item.w.length];
  const cell = s("rect", { class: "cell", width: 1, height: 1, visibility: "hidden" });
  const layer = s("svg", { class: "grid-layer", viewBox: `0 0 ${columns} ${rows}`, preserveAspectRatio: "none" },
    s("rect", { class: "catch", width: columns, height: rows }), cell);
  layer.addEventListener("mousemove", (event) => {
    const place = layer.getBoundingClientRect();
    const j = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - place.left) / place.width) * columns)));
    const i = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - place.top) / place.height) * rows)));
    cell.setAttribute("x", j); cell.setAttribute("y", i); cell.setAttribute("visibility", "visible");
    const token = item.start + (k * rows + i) * columns + j;
    showTip(event, `position t ${item.t[k]}, h ${item.h[i]}, w ${item.w[j]}`, `token ${count(token)}: row ${i}, column ${j}${item.t.length > 1 ? `, step ${k}` : ""}`);
    mark(true);
  });
  layer.addEventListener("mouseleave", () => { cell.setAttribute("visibility", "hidden"); hideTip(); mark(false); });
  return layer;
};

const frame = (item, place, content) => {
  const { columns, width, height, shown } = item.strip, rows = Math.ceil(shown.length / columns);
  const x = columns > 1 ? (100 * (place % columns)) / (columns - 1) : 0;
  const y = rows > 1 ? (100 * Math.floor(place / columns)) / (rows - 1) : 0;
  return h("div", {
    class: "frame",
    style: `aspect-ratio:${width}/${height};background-image:url("${item.file}");background-size:${100 * columns}% ${100 * rows}%;background-position:${x}% ${y}%`,
  }, content);
};

const mediaView = (item, number, mark) => {
  const size = `${item.width} × ${item.height}`;
  const tokens = `${item.t.length > 1 ? `${item.t.length} × ` : ""}${item.h.length} × ${item.w.length} = ${count(item.tokens)} tokens`;
  const caption = item.kind === "image"
    ? `${item.name}: ${size} pixels, seen as ${item.seen[0]} × ${item.seen[1]}, ${tokens}`
    : `${item.name}: ${item.seconds} s at ${item.fps} frames a second, ${size}; ${2 * item.t.length} of ${count(item.frames)} frames, seen as ${item.seen[0]} × ${item.seen[1]}, ${tokens}`;
  const drawing = item.kind === "image"
    ? h("div", { class: "still", style: `aspect-ratio:${item.seen[0]}/${item.seen[1]};--ratio:${item.seen[0] / item.seen[1]};max-width:${4 * item.seen[0]}px` },
        h("img", { src: item.file, alt: item.name }), boxLayer(item.boxes), tokenLayer(item, 0, mark))
    : h("div", { class: "frames" }, item.strip.shown.filter((shown) => shown % 2 === 0).map((first) => h("div", { class: "pair" },
        [first, first + 1].map((shown) => h("div", {},
          frame(item, item.strip.shown.indexOf(shown), [boxLayer(item.boxes), tokenLayer(item, first / 2, mark)]),
          h("small", {}, item.times.length ? `${item.times[shown].toFixed(2)} s` : `frame ${shown}`))))));
  const left = 2 * item.t.length - (item.strip ? item.strip.shown.length : 0);
  const view = h("figure", { class: "media", "data-media": number }, drawing,
    h("figcaption", {}, caption, item.kind === "video" ? " Two frames make one step in time." : "", item.kind === "video" && left > 0 ? ` ${left} frames are not drawn here.` : ""));
  if (item.boxes.length) {
    const list = h("ul", { class: "phrases" }, item.boxes.slice(0, 200).map((box, i) =>
      h("li", { "data-box": i }, h("i", { class: `swatch ${color(i)}` }), box.phrase || "(no phrase)")));
    view.append(list);
    const light = (event, on) => {
      const i = event.target.closest("[data-box]")?.dataset.box;
      if (i !== undefined) for (const box of all(`polygon[data-box="${i}"]`, view)) box.classList.toggle("lit", on);
    };
    list.addEventListener("mouseover", (event) => light(event, true));
    list.addEventListener("mouseout", (event) => light(event, false));
  }
  return view;
};

const tokenView = (found, markMedia) => {
  const { text, ids, pos, kinds } = found.pieces;
  const view = h("div", { class: "tokens" });
  let at = 0, media = 0;
  const starts = [];
  text.forEach((words, i) => {
    starts.push(at);
    const kind = kinds[i].toLowerCase(), learnt = kinds[i] !== kind;
    if (kind === "m") {
      const item = found.media[media];
      view.append(h("span", { class: "piece m", "data-i": i, "data-media": media }, `${item.kind} ${item.name}, ${count(item.tokens)} tokens`));
      at += item.tokens;
      media += 1;
      return;
    }
    const shown = words.replace(/\n/g, "↵\n");
    view.append(h("span", { class: `piece ${kind}${learnt ? " learnt" : ""}`, "data-i": i }, shown === "" ? "∅" : shown));
    at += Array.isArray(ids[i]) ? ids[i].length : 1;
  });
  const tell = (event) => {
    const piece = event.target.closest(".piece");
    if (!piece) return hideTip();
    const i = +piece.dataset.i;
    if (piece.dataset.media !== undefined) {
      const item = found.media[piece.dataset.media];
      const span = (axis) => `${axis[0]}${axis.length > 1 ? ` … ${axis[axis.length - 1]}` : ""}`;
      markMedia(piece.dataset.media);
      return showTip(event, `position t ${span(item.t)}, h ${span(item.h)}, w ${span(item.w)}`, `tokens ${count(item.start)} to ${count(item.start + item.tokens - 1)}, not supervised`, "point at the picture for each");
    }
    markMedia(null);
    return showTip(event, `position ${position(pos[i])}`, `token ${count(starts[i])}, id ${[ids[i]].flat().join(" ")}`, kinds[i] === kinds[i].toLowerCase() ? "not supervised" : "supervised");
  };
  view.addEventListener("mousemove", tell);
  view.addEventListener("click", tell);
  view.addEventListener("mouseleave", () => { hideTip(); markMedia(null); });
  return view;
};

const documentView = (found, dialog) => {
  const chip = (number, on) => { for (const piece of all(`.piece[data-media="${number}"]`, dialog)) piece.classList.toggle("lit", on); };
  const light = (number) => { for (const view of all(".media", dialog)) view.classList.toggle("lit", view.dataset.media === `${number}`); };
  const seen = found.media.map((item, number) => mediaView(item, number, (on) => chip(number, on)));
  const keys = h("p", { class: "token-keys" },
    h("span", { class: "piece t learnt" }, "supervised"), h("span", { class: "piece t" }, "prompt"),
    h("span", { class: "piece s" }, "<|special|>"), h("span", { class: "piece m" }, "picture or clip"));
  const facts = h("p", { class: "hint" },
    `${count(found.tokens)} tokens, ${count(found.supervised)} of them supervised (${percent(found.supervised / found.tokens)}). Point at a token or at a picture for its position.`);
  return [seen, [keys, facts, tokenView(found, light)]];
};
