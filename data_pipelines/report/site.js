// The page: header, packs, the list of samples with its filters, and the dialog that shows one document.
const page = JSON.parse(document.getElementById("content").textContent);
const SECTIONS = { mixture: "Mixture", lengths: "Lengths", packs: "Packs", samples: "Samples", problems: "Left out" };
const STEP = 48;
document.querySelector("h1").textContent = page.title;
document.querySelector(".facts").textContent = page.facts.join(" · ");
drawMixture(page);
drawCharts(page);

// Packs: a bar each, its documents by length, the budget that no document filled hatched at its end.
const drawPacks = () => {
  if (!page.packs.length) return;
  const section = document.getElementById("packs"), [capacity, patches] = page.capacity;
  section.hidden = false;
  section.querySelector(".hint").textContent =
    `${page.fill ? `${page.fill}. ` : ""}Each bar is a pack of up to ${count(capacity)} tokens, its documents end to end; the hatched rest stays unused: no padding is computed. ViT is the share of the ${count(patches)} patches. Documents with a bright edge can be opened.`;
  const more = section.querySelector(".more");
  let shown = 0;
  const row = (pack) => {
    const parts = pack.docs.map(([number, tokens, , , place], i) =>
      h(place >= 0 ? "button" : "span", {
        class: `part ${color(number)}${place >= 0 ? " open" : ""}`, type: place >= 0 ? "button" : null, "data-part": i, style: `flex-grow:${tokens}`,
        "aria-label": place >= 0 ? `document ${i + 1}` : null,
      }));
    const bar = h("div", { class: "packbar" }, parts, h("span", { class: "rest", style: `flex-grow:${Math.max(0, capacity - pack.tokens)}` }));
    bar.addEventListener("mousemove", (event) => {
      const part = event.target.closest("[data-part]");
      if (!part) return showTip(event, `${count(capacity - pack.tokens)} tokens unused (${percent(1 - pack.tokens / capacity)})`);
      const [number, tokens, rows, key] = pack.docs[part.dataset.part];
      return showTip(event, key, `${page.datasets[number]}: ${count(tokens)} tokens, ${count(rows)} patches`);
    });
    bar.addEventListener("mouseleave", hideTip);
    bar.addEventListener("click", (event) => {
      const part = event.target.closest(".open");
      if (part) open(pack.docs[part.dataset.part][4], pack.docs.map((doc) => doc[4]).filter((place) => place >= 0));
    });
    const full = Math.max(pack.tokens / capacity, 0);
    return h("div", { class: "packrow" }, h("b", {}, `${pack.number}`), bar,
      h("span", { class: "figures" }, `${count(pack.docs.length)} documents, ${(100 * full).toFixed(2)}%`, h("small", {}, ` · ViT ${percent(pack.patches / patches)}`)));
  };
  const grow = () => {
    section.querySelector(".bars").append(...page.packs.slice(shown, shown + 12).map(row));
    shown = Math.min(page.packs.length, shown + 12);
    more.hidden = shown >= page.packs.length;
  };
  more.addEventListener("click", grow);
  grow();
};

// Samples: cards of what matches the filters, more of them as the end comes into view.
const singles = page.documents.map((_, place) => place).filter((place) => page.documents[place].pack === undefined);
const listed = singles.length ? singles : page.documents.map((_, place) => place);
const chosen = { dataset: "all", task: "all", media: "all", sort: "in order", words: "" };
let matching = [], drawn = 0;
const kindOf = (doc) => (doc.media.some((item) => item.kind === "video") ? "clips" : doc.media.length ? "pictures" : "text alone");
const ORDERS = {
  "in order": null,
  longest: (a, b) => b.tokens - a.tokens,
  shortest: (a, b) => a.tokens - b.tokens,
  "most supervised": (a, b) => b.supervised / b.tokens - a.supervised / a.tokens,
};
const card = (place) => {
  const doc = page.documents[place], item = doc.media[0];
  let drawing = h("p", { class: "words" }, doc.excerpt);
  if (item) {
    const content = boxLayer(item.boxes || [], false);
    const picture = item.kind === "image"
      ? h("div", { class: "still", style: `aspect-ratio:${item.seen[0]}/${item.seen[1]};--ratio:${item.seen[0] / item.seen[1]}` }, h("img", { src: item.file, alt: "", loading: "lazy", decoding: "async" }), content)
      : h("div", { class: "still", style: `aspect-ratio:${item.seen[0]}/${item.seen[1]};--ratio:${item.seen[0] / item.seen[1]}` }, frame(item, 0, content));
    const badge = item.kind === "video" ? `${item.seconds.toFixed(1)} s, ${item.count} frames` : doc.num_media > 1 ? `1 of ${doc.num_media}` : "";
    drawing = h("div", { class: "drawing" }, picture, badge ? h("span", { class: "badge" }, badge) : null);
  }
  return h("button", { type: "button", class: "card sample", "data-place": place }, drawing,
    h("span", { class: "line" }, h("i", { class: `swatch ${color(page.datasets.indexOf(doc.dataset))}` }), h("b", {}, doc.dataset), " ", doc.task),
    item ? h("span", { class: "excerpt" }, doc.excerpt) : null,
    h("span", { class: "figures" }, `${count(doc.tokens)} tokens, ${count(doc.supervised)} supervised`));
};
const grow = () => {
  const cards = document.querySelector(".cards");
  cards.append(...matching.slice(drawn, drawn + STEP).map(card));
  drawn = Math.min(matching.length, drawn + STEP);
};
const filter = () => {
  const words = chosen.words.toLowerCase();
  matching = listed.filter((place) => {
    const doc = page.documents[place];
    return (chosen.dataset === "all" || doc.dataset === chosen.dataset) && (chosen.task === "all" || doc.task === chosen.task) &&
      (chosen.media === "all" || kindOf(doc) === chosen.media) && (!words || `${doc.key} ${doc.excerpt}`.toLowerCase().includes(words));
  });
  const order = ORDERS[chosen.sort];
  if (order) matching.sort((a, b) => order(page.documents[a], page.documents[b]));
  document.querySelector(".cards").replaceChildren();
  drawn = 0;
  grow();
  document.querySelector(".filters output").textContent = `${count(matching.length)} of ${count(listed.length)} shown`;
};
const drawSamples = () => {
  if (!listed.length) return;
  const section = document.getElementById("samples");
  section.hidden = false;
  const choice = (name, label, values) => {
    const select = h("select", { "aria-label": label }, values.map((value) => h("option", { value }, value === "all" ? `all ${label}` : value)));
    select.addEventListener("change", () => { chosen[name] = select.value; filter(); });
    return values.length > 2 || name === "sort" ? select : null;
  };
  const kinds = (of) => ["all", ...new Set(listed.map((place) => of(page.documents[place])))];
  const search = h("input", { type: "search", placeholder: "key or words", "aria-label": "key or words" });
  search.addEventListener("input", () => { chosen.words = search.value; filter(); });
  section.querySelector(".filters").append(...[
    choice("dataset", "data sets", kinds((doc) => doc.dataset)), choice("task", "tasks", kinds((doc) => doc.task)),
    choice("media", "media", kinds(kindOf)), choice("sort", "order", Object.keys(ORDERS)), search, h("output"),
  ].filter(Boolean));
  section.querySelector(".cards").addEventListener("click", (event) => {
    const found = event.target.closest("[data-place]");
    if (found) open(+found.dataset.place, matching);
  });
  new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) grow(); }, { rootMargin: "800px" })
    .observe(section.querySelector(".sentinel"));
  filter();
};

const drawProblems = () => {
  if (!page.num_problems) return;
  const section = document.getElementById("problems");
  section.hidden = false;
  const rest = page.num_problems - page.problems.length;
  section.querySelector(".hint").textContent =
    `${count(page.num_problems)} entries: samples that a run leaves out, changes or merely notes${rest ? `; the last ${count(rest)} are not listed here` : ""}.`;
  section.querySelector("table").append(
    h("thead", {}, h("tr", {}, ["data set", "sample", "reason", "what"].map((name) => h("th", {}, name)))),
    h("tbody", {}, page.problems.map((row) => h("tr", {}, row.map((cell, i) => h("td", { class: i === 3 ? "long" : "" }, cell))))));
};

// The dialog: the document `place`, and its neighbours in `order` by the arrow keys.
const dialog = document.getElementById("document");
let current = -1, neighbours = [];
const address = (hash) => {
  try { history.replaceState(null, "", hash); } catch { /* some browsers forbid it on pages from disk */ }
};
const open = (place, order) => {
  current = place;
  neighbours = order;
  const doc = page.documents[place];
  dialog.querySelector(".name").replaceChildren(
    h("i", { class: `swatch ${color(page.datasets.indexOf(doc.dataset))}` }), h("b", {}, doc.dataset), ` ${doc.task} `,
    h("code", {}, doc.key), h("small", {}, ` ${doc.shard}${doc.pack === undefined ? "" : ` · pack ${doc.pack}, document ${doc.item + 1}`}`));
  if (!dialog.open) dialog.showModal();
  liftTip(dialog);
  hideTip();
  const [seen, read] = [dialog.querySelector(".seen"), dialog.querySelector(".read")];
  details(doc).then((found) => {
    if (current !== place) return;
    const [left, right] = documentView(found, dialog);
    seen.replaceChildren(...left);
    read.replaceChildren(...right);
    dialog.classList.toggle("wordy", !left.length);
    dialog.querySelector(".body").scrollTop = seen.scrollTop = read.scrollTop = 0;
  }, (error) => { seen.replaceChildren(); read.replaceChildren(h("p", { class: "hint" }, error.message)); });
  address(`#d${place}`);
};
const step = (by) => {
  const next = neighbours[neighbours.indexOf(current) + by];
  if (next !== undefined) open(next, neighbours);
};
for (const button of all("button.step", dialog)) button.addEventListener("click", () => step(+button.dataset.step));
dialog.querySelector(".close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
dialog.addEventListener("close", () => { hideTip(); liftTip(document.body); address("#samples"); });

drawPacks();
drawSamples();
drawProblems();
document.querySelector("nav").append(...Object.entries(SECTIONS).filter(([name]) => !document.getElementById(name).hidden)
  .map(([name, words]) => h("a", { href: `#${name}` }, words)));
const asked = /^#d(\d+)$/.exec(location.hash);
if (asked && page.documents[asked[1]]) open(+asked[1], listed);
