// Pictures go to /predict, their answers come back as lines of json, each in the moment it is ready.
// What the server says and what files are called becomes text (textContent), never markup.

const PART = 700; // bytes of a form around a file, its name of at most NAME characters included
const NAME = 100;
const POLL = 1000; // milliseconds
const TRIES = 40; // of a request, while the server is busy
const SMALL = 64; // pixels; a smaller picture is enlarged without smoothing

const byId = id => document.getElementById(id);
const wait = ms => new Promise(resolve => setTimeout(resolve, ms));
const percent = share => `${(100 * share).toFixed(1)} %`;
const milliseconds = ms => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
const sum = numbers => numbers.reduce((a, b) => a + b, 0);
const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// ------------------------------------------------------------------------------- the model

const KINDS = {
  local: "local head",
  global: "global head",
  other: "head",
  final: "final classifier",
};

const kindOf = (model, exit) => {
  const head = model.heads[exit];
  if (head === undefined) return "final";
  return /^lph/i.test(head) ? "local" : /^gah/i.test(head) ? "global" : "other";
};

const nameOf = (model, exit) =>
  exit === model.heads.length ? "final classifier" : `exit ${exit + 1}, ${KINDS[kindOf(model, exit)]}`;

// A classifier's mark: its form, not its colour alone, says what it is.
function mark(kind, x, y, r, state = "") {
  const at = { class: `mark ${kind} ${state}` };
  if (kind === "local") return shape("circle", { ...at, cx: x, cy: y, r });
  if (kind === "global") return shape("rect", { ...at, x: x - r, y: y - r, width: 2 * r, height: 2 * r });
  if (kind === "other") return shape("path", { ...at, d: `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z` });
  return shape("path", { ...at, d: `M${x - r} ${y - r}H${x + r}L${x} ${y + r}Z` });
}

// Blocks 1 to L in a row, the classifiers below; with `taken`, the way of an image up to that one.
function track(model, step, top, taken = null) {
  const layers = model.layers, depth = layers.at(-1), width = step * depth;
  const size = Math.min(step * 0.72, 18), r = Math.min(step * 0.22, 5);
  const middle = top + size / 2, below = top + size + 9;
  const centre = block => (block - 0.5) * step;
  const reached = taken === null ? 0 : layers[taken];
  const parts = [shape("line", { class: "base", x1: 0, y1: middle, x2: width, y2: middle })];
  if (reached) parts.push(shape("line", { class: "base passed", x1: 0, y1: middle, x2: centre(reached), y2: middle }));
  for (let block = 1; block <= depth; block++) {
    const box = { x: centre(block) - size / 2, y: top, width: size, height: size, rx: 2 };
    parts.push(shape("rect", { class: block <= reached ? "block passed" : "block", ...box }));
  }
  layers.forEach((layer, exit) => {
    const x = centre(layer), state = exit === taken ? "taken" : layer < reached ? "passed" : "";
    parts.push(shape("line", { class: `stem ${state}`, x1: x, y1: top + size, x2: x, y2: below }));
    parts.push(mark(kindOf(model, exit), x, below + r, exit === taken ? r * 1.3 : r, state));
    if (taken === null ? step > 16 || exit === layers.length - 1 : exit === taken) {
      parts.push(shape("text", { class: "number", x, y: below + 2 * r + 14 }, String(layer)));
    }
  });
  return { parts, centre, width, height: below + 2 * r + 18 };
}

function way(model, exit) {
  const layer = model.layers[exit], depth = model.layers.at(-1);
  const drawn = track(model, Math.min(288 / depth, 36), 2, exit);
  const label = `the way through the model: blocks 1 to ${layer} of ${depth}, then ${nameOf(model, exit)}`;
  return shape("svg", { viewBox: `0 0 ${drawn.width} ${drawn.height}`, role: "img", "aria-label": label }, ...drawn.parts);
}

// ------------------------------------------------------------------------------- the counts

let model = null, all = [], mine = [], computed = [];

function histogram() {
  if (!model) return;
  const room = Math.max(byId("chart").clientWidth, 240), high = 110, top = 20;
  const step = Math.min(room / model.layers.at(-1), 90);
  const drawn = track(model, step, top + high + 6);
  const shares = [mine, all].map(counts => model.layers.map((_, exit) => (counts[exit] ?? 0) / Math.max(sum(counts), 1)));
  const most = Math.max(...shares.flat(), 1e-9), bar = Math.min(step * 0.36, 18);
  const labelled = sum(mine) ? 0 : 1;
  model.layers.forEach((layer, exit) => {
    const x = drawn.centre(layer);
    ["mine", "all"].forEach((who, place) => {
      const height = (high * shares[place][exit]) / most;
      const box = { x: x + (place - 1) * bar, y: top + high - height, width: bar, height };
      const about = `${percent(shares[place][exit])} of ${place ? "the server's" : "this page's"} images`;
      drawn.parts.push(shape("rect", { class: who, ...box }, shape("title", {}, about)));
      if (shares[place][exit] && place === labelled && step >= 34) {
        const text = `${Math.round(100 * shares[place][exit])} %`;
        drawn.parts.push(shape("text", { class: "number", x: box.x + bar / 2, y: box.y - 5 }, text));
      }
    });
  });
  const about = { role: "img", "aria-label": "share of images by the block after which they left; the table below has the numbers" };
  const size = { width: drawn.width, height: drawn.height, viewBox: `0 0 ${drawn.width} ${drawn.height}` };
  byId("chart").replaceChildren(shape("svg", { ...size, ...about }, ...drawn.parts));
  byId("numbers").replaceChildren(...model.layers.map((layer, exit) => {
    const cells = [nameOf(model, exit), layer, mine[exit], all[exit] ?? "–"];
    return element("tr", {}, ...cells.map(cell => element("td", {}, String(cell))));
  }));
}

let drawing = false;
function redraw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    histogram();
  });
}

let timer = 0;
async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const { exits } = await getJson("stats");
    if (String(exits) !== String(all)) {
      all = exits;
      redraw();
    }
  } catch {
    // the next time, perhaps: what is shown stays true of this page's own images
  }
  clearTimeout(timer);
  timer = setTimeout(poll, POLL);
}

function describe() {
  const used = [...new Set(model.layers.map((_, exit) => kindOf(model, exit)))];
  const key = (sign, text) => element("span", { class: "key" }, shape("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }, sign), text);
  byId("legend").replaceChildren(
    key(shape("rect", { class: "mine", x: 1, y: 1, width: 12, height: 12 }), "this page's images"),
    key(shape("rect", { class: "all", x: 1, y: 1, width: 12, height: 12 }), "all the server's"),
    ...used.map(kind => key(mark(kind, 7, 7, 5), KINDS[kind])),
  );
  const facts = {
    policy: model.policy,
    certificate: model.certificate ?? "none: nothing is claimed of the accuracy",
    model: `${model.layers.at(-1)} blocks, ${count(model.heads.length, "exit")}, ${model.num_classes} classes, ${model.size.join(" × ")} pixels`,
    runs: `${model.precision} in ${model.runtime}, up to ${count(model.batch_size, "image")} at once`,
  };
  byId("facts").replaceChildren(...Object.entries(facts).flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]));
}

// ------------------------------------------------------------------------------- one picture

class Card {
  constructor(file) {
    this.file = file;
    this.settled = false;
    this.image = element("img", { class: "picture", alt: "", loading: "lazy", decoding: "async" });
    this.image.addEventListener("load", () => {
      this.image.classList.toggle("small", Math.max(this.image.naturalWidth, this.image.naturalHeight) <= SMALL);
    });
    this.image.addEventListener("error", () => this.image.classList.add("none"));
    this.url = URL.createObjectURL(file);
    this.image.src = this.url;
    this.title = element("h3", {}, "…");
    this.head = element("div", {}, this.title, element("p", { class: "quiet" }, file.name));
    this.root = element("article", { class: "card", "aria-busy": "true" }, element("div", { class: "head" }, this.image, this.head));
  }

  settle(title, ...more) {
    this.settled = true;
    this.title.textContent = title;
    this.root.removeAttribute("aria-busy");
    this.root.append(...more);
  }

  answer(found) {
    const { exit_index: exit, exit_layer: layer } = found, depth = model.layers.at(-1);
    const rows = found.top.map(({ label, probability }) => {
      const share = element("i");
      share.style.width = `${100 * probability}%`;
      return element(
        "li", {}, element("span", { class: "label" }, label), element("span", { class: "share" }, share),
        element("span", { class: "percent" }, percent(probability)),
      );
    });
    this.head.append(element("p", {}, `${percent(found.confidence)} sure`));
    const left = `Left after block ${layer} of ${depth}: ${nameOf(model, exit)}`;
    const times = `${milliseconds(found.queued_ms)} queued, ${milliseconds(found.computed_ms)} computed`;
    const rule = found.policy === model.policy ? [] : [element("p", { class: "quiet" }, `under ${found.policy}`)];
    this.settle(
      found.label, element("ol", { class: "top" }, ...rows), way(model, exit),
      element("p", { class: "left" }, left), element("p", { class: "times" }, times), ...rule,
    );
    mine[exit] += 1;
    computed.push(found.computed_ms);
    redraw();
  }

  fail(text) {
    if (this.settled) return;
    this.settle("No answer", element("p", { class: "failure" }, text));
    this.root.classList.add("failed");
  }

  forget() {
    URL.revokeObjectURL(this.url);
    this.root.remove();
  }
}

// ------------------------------------------------------------------------------- sending

let cards = [], pending = [], sending = false, stop = new AbortController();

async function getJson(path) {
  const response = await fetch(path, { cache: "no-store" });
  if (!response.ok) throw new Error(`the server answers ${response.status}`);
  return response.json();
}

let loading = null;
function load() {
  loading ??= getJson("model").then(found => {
    model = found;
    mine = model.layers.map(() => 0);
    describe();
    redraw();
  }).catch(error => {
    loading = null; // the next drop asks again
    throw error;
  });
  return loading;
}

function add(files) {
  if (!files.length) return;
  const added = files.map(file => new Card(file));
  cards.push(...added);
  pending.push(...added);
  byId("cards").prepend(...added.map(card => card.root));
  byId("clear").disabled = false;
  byId("status").textContent = `${count(added.length, "picture")} to answer`;
  if (!sending) send();
}

async function send() {
  sending = true;
  let most = Infinity, tries = 0; // fewer images a request while the server is busy
  while (pending.length) {
    progress();
    let chunk = [];
    try {
      await load();
      most = Math.min(most, model.max_images);
      chunk = take(most);
      const busy = await request(chunk);
      if (busy && ++tries < TRIES) {
        chunk = chunk.filter(card => !card.settled);
        pending.unshift(...chunk);
        most = Math.max(1, Math.floor(chunk.length / 2));
        byId("status").textContent = `The server is busy; the next try is in ${busy} s`;
        await wait(1000 * busy);
      } else {
        chunk.forEach(card => card.fail(busy ? "the server is busy" : "the connection was closed before the answer"));
        most *= 2;
        tries = 0;
      }
    } catch (error) {
      const failed = chunk.length ? chunk : pending.splice(0);
      failed.forEach(card => card.fail(error instanceof TypeError ? "the server cannot be reached" : error.message));
    }
  }
  sending = false;
  progress();
  summarise();
}

// The next pictures that fit into one request; one that fits into none is told so.
function take(most) {
  const chunk = [], limit = model.max_upload_mb * 2 ** 20;
  let room = limit;
  while (pending.length && chunk.length < most) {
    const size = pending[0].file.size + PART;
    if (size > limit) {
      pending.shift().fail(`larger than the ${model.max_upload_mb} MiB that the server takes`);
    } else if (size > room) {
      break;
    } else {
      room -= size;
      chunk.push(pending.shift());
    }
  }
  return chunk;
}

// Ask for some pictures; the seconds to wait if the server is busy, else 0.
async function request(chunk) {
  const form = new FormData(), sent = [];
  for (const card of chunk) {
    try { // into memory, so that a file which cannot be read does not break the others' request
      const bytes = await card.file.arrayBuffer();
      form.append("image", new Blob([bytes], { type: card.file.type }), card.file.name.slice(-NAME));
      sent.push(card);
    } catch {
      card.fail("the file cannot be read");
    }
  }
  if (!sent.length) return 0;
  const response = await fetch("predict", { method: "POST", body: form, signal: stop.signal });
  if (response.status === 429) return Number(response.headers.get("Retry-After")) || 1;
  const streamed = response.headers.get("Content-Type")?.startsWith("application/x-ndjson");
  if (!streamed) {
    const found = await response.json().catch(() => ({ error: `the server answers ${response.status}` }));
    sent.forEach(card => tell(card, found));
    return 0;
  }
  for await (const line of lines(response.body)) {
    const found = JSON.parse(line);
    tell(sent[found.image], found);
  }
  return 0;
}

function tell(card, found) {
  if (found.error === undefined) card.answer(found);
  else card.fail(found.error);
  progress();
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const whole = (rest + value).split("\n");
    rest = whole.pop();
    yield* whole.filter(line => line);
  }
  if (rest) yield rest;
}

function progress() {
  const bar = byId("progress");
  bar.hidden = !sending;
  bar.max = Math.max(cards.length, 1);
  bar.value = cards.filter(card => card.settled).length;
}

function summarise() {
  const answered = sum(mine), failed = cards.filter(card => card.root.classList.contains("failed")).length;
  const parts = [`${count(answered, "picture")} answered`];
  if (failed) parts.push(`${failed} without an answer`);
  if (answered) {
    const layers = sum(model.layers.map((layer, exit) => layer * mine[exit])) / answered;
    const median = computed.toSorted((a, b) => a - b)[Math.floor(answered / 2)];
    parts.push(`${layers.toFixed(1)} of ${model.layers.at(-1)} blocks on average`, `${milliseconds(median)} computed (median)`);
  }
  byId("status").textContent = cards.length ? parts.join(", ") : "";
}

function clear() {
  stop.abort();
  stop = new AbortController();
  cards.forEach(card => card.forget());
  cards = [];
  pending = [];
  computed = [];
  mine.fill(0);
  byId("clear").disabled = true;
  redraw();
  progress();
  summarise();
}

// ------------------------------------------------------------------------------- what comes in

// Files of a drop, with the pictures of dropped folders at any depth.
async function dropped(transfer) {
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry?.());
  const files = [...transfer.files]; // both lists are empty once the event is over
  if (!entries.some(entry => entry?.isDirectory)) return files;
  return (await Promise.all(entries.filter(entry => entry).map(entry => within(entry, true)))).flat();
}

async function within(entry, any) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject)).catch(() => null);
    return file && (any || file.type.startsWith("image/")) ? [file] : [];
  }
  const reader = entry.createReader(), found = [];
  for (;;) { // a folder is read in parts
    const part = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)).catch(() => []);
    if (!part.length) return found;
    for (const inner of part) found.push(...(await within(inner, false)));
  }
}

const zone = byId("drop");
byId("files").addEventListener("change", event => {
  add([...event.target.files]);
  event.target.value = ""; // the same files may be chosen again
});
for (const name of ["dragover", "drop"]) document.addEventListener(name, event => event.preventDefault());
document.addEventListener("dragover", () => zone.classList.add("over"));
document.addEventListener("dragleave", event => event.relatedTarget || zone.classList.remove("over"));
document.addEventListener("drop", async event => {
  zone.classList.remove("over");
  add(await dropped(event.dataTransfer));
});
document.addEventListener("paste", event => add([...event.clipboardData.files]));
byId("clear").addEventListener("click", clear);
document.addEventListener("visibilitychange", poll);
new ResizeObserver(redraw).observe(byId("chart"));
load().catch(error => {
  byId("status").textContent = `The model cannot be shown: ${error.message}`;
});
poll();
