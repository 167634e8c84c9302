// Shows the network stage by stage, live while the visitor draws, with one of three kinds of norm.

import { exampleButtons, EXAMPLES, rasterise } from "./examples.js";
import { fold, parse, run } from "./network.js";
import { bindTools, makePaper } from "./paper.js";

const $ = (id) => document.getElementById(id);
const SIDE = 28;
const STAGES = [
  ["First convolution", "Six filters of 5 × 5 find edges.", ["conv1", "norm1", "sigmoid1", "pool1"]],
  ["Second convolution", "Sixteen filters read the six maps.", ["conv2", "norm2", "sigmoid2", "pool2"]],
  ["First linear layer", "120 units; each reads all maps.", ["linear1", "norm3", "sigmoid3"]],
  ["Second linear layer", "84 units; each reads all 120.", ["linear2", "norm4", "sigmoid4"]],
];
const CAPTIONS = {
  conv: "Before the norm", linear: "Before the norm", norm: "After the norm",
  sigmoid: "After the sigmoid", pool: "Means of 2 × 2",
};
const LIMITS = { conv: 1.5, linear: 1.5, norm: 6, sigmoid: 1, pool: 1 }; // values with the deepest colours
const AXES = { conv: [-8, 8], linear: [-8, 8], norm: [-8, 8], sigmoid: [0, 1], pool: [0, 1] };
const BINS = 48;

let networks; // {fixed, batch, folded}
let pixels = new Uint8Array(SIDE ** 2); // the picture
let examples = []; // their pixels
let kept = []; // pictures that the visitor added to the batch
let due = false;

const kind = (name) => name.replace(/\d/, "");
const percent = (p) => `${(100 * p).toFixed(1)}\u00a0%`;
const signed = (value) => value.toFixed(2).replace("-", "−");
const mode = () => document.querySelector("[name=statistics]:checked").value;
const pressed = () => [...$("others").querySelectorAll("button[aria-pressed]")];

/** Converts a drawing like the data set: 28 pixels on the longer edge, centred, light on dark. */
function shrink(canvas) {
  const side = canvas.width;
  const { data } = canvas.getContext("2d").getImageData(0, 0, side, side);
  const ink = new Float32Array(side * side)
    .map((_, i) => 255 - 0.299 * data[4 * i] - 0.587 * data[4 * i + 1] - 0.114 * data[4 * i + 2]);
  let left = side, top = side, right = 0, bottom = 0;
  ink.forEach((value, i) => {
    if (value < 8) return;
    left = Math.min(left, i % side);
    right = Math.max(right, (i % side) + 1);
    top = Math.min(top, Math.floor(i / side));
    bottom = Math.max(bottom, Math.floor(i / side) + 1);
  });
  const result = new Float32Array(SIDE ** 2);
  if (right === 0) return Uint8Array.from(result);
  const scale = SIDE / Math.max(right - left, bottom - top);
  const width = Math.max(1, Math.round((right - left) * scale)), height = Math.max(1, Math.round((bottom - top) * scale));
  const x0 = Math.ceil((SIDE - width) / 2), y0 = Math.ceil((SIDE - height) / 2);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      let sum = 0, count = 0;
      for (let v = Math.floor(top + y / scale); v < Math.min(bottom, top + (y + 1) / scale); v += 1) {
        for (let u = Math.floor(left + x / scale); u < Math.min(right, left + (x + 1) / scale); u += 1) {
          sum += ink[v * side + u];
          count += 1;
        }
      }
      result[(y0 + y) * SIDE + x0 + x] = count && sum / count;
    }
  }
  const largest = Math.max(1, ...result);
  return Uint8Array.from(result, (value) => Math.round(255 * value / largest));
}

function paintPixels(canvas, values) {
  const image = new ImageData(SIDE, SIDE);
  values.forEach((value, i) => image.data.set([value, value, value, 255], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// The stages.

const figures = {};

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function build() {
  for (const [title, text, names] of STAGES) {
    const row = element("div", { className: "row" });
    for (const name of names) {
      const maps = element("canvas", { className: "maps", role: "img" });
      const spread = element("canvas", { className: "spread", width: 2 * BINS, height: 28, ariaHidden: "true" });
      const caption = element("figcaption"), numbers = element("p", { className: "numbers" });
      const figure = element("figure", { id: name }, caption, maps, spread, numbers);
      const whiskers = kind(name) === "norm" && element("canvas", { className: "whiskers", width: 360, height: 90, role: "img" });
      if (whiskers) {
        figure.append(whiskers, element("p", { className: "numbers" }, "Mean ± deviation of each channel: ",
          element("span", { className: "mean", textContent: "fixed" }), ", ",
          element("span", { className: "own", textContent: "batch" })));
      }
      figures[name] = { figure, caption, maps, spread, numbers, whiskers };
      row.append(figure);
    }
    $("stages").append(element("section", {}, element("h2", { textContent: title }), element("p", { className: "quiet", textContent: text }), row));
  }
  $("answers").tBodies[0].append(...networks.fixed.classes.map((label) => element("tr", {},
    element("th", { scope: "row", textContent: label }),
    ...["fixed", "batch", "folded"].map((value) => element("td", { className: value }, element("data"))))));
  $("revision").textContent = networks.fixed.revision;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
const triple = (hex) => (hex.length === 4 ? [1, 2, 3].map((i) => 17 * parseInt(hex[i], 16)) : [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));

function paintStage(name, stage, ground) {
  const { figure, caption, maps, spread, numbers, whiskers } = figures[name];
  caption.textContent = mode() === "folded" && /conv|linear/.test(name) ? "Norm folded in" : CAPTIONS[kind(name)];
  figure.classList.toggle("gone", !stage);
  if (!stage) {
    caption.textContent = "The norm is gone";
    return;
  }
  const [values] = stage.batch; // the picture comes first
  const places = values.length / stage.channels, side = Math.sqrt(places);
  const columns = { 6: 3, 16: 4, 120: 15, 84: 14 }[stage.channels];
  const gap = side > 1 ? 1 : 0, step = side + gap, rows = stage.channels / columns;
  const image = new ImageData(columns * step - gap, rows * step - gap);
  values.forEach((value, i) => {
    const c = Math.floor(i / places), x = (c % columns) * step + (i % side), y = Math.floor(c / columns) * step + Math.floor((i % places) / side);
    const share = Math.min(1, Math.abs(value) / LIMITS[kind(name)]);
    const end = value > 0 ? [255, 110, 30] : [60, 130, 255];
    image.data.set([...end.map((e, k) => ground[k] + share * (e - ground[k])), 255], 4 * (y * image.width + x));
  });
  maps.width = image.width;
  maps.height = image.height;
  maps.getContext("2d").putImageData(image, 0, 0);
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  const deviation = Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
  numbers.textContent = `${signed(mean)} ± ${signed(deviation)}`;
  maps.ariaLabel = `${stage.channels} ${side > 1 ? `maps of ${side} by ${side}` : "values"}, ${caption.textContent.toLowerCase()}`;
  paintSpread(spread, values, AXES[kind(name)]);
  if (whiskers) paintWhiskers(whiskers, stage);
}

function paintSpread(canvas, values, [from, to]) {
  const counts = new Uint32Array(BINS);
  for (const value of values) {
    counts[Math.max(0, Math.min(BINS - 1, Math.floor((value - from) / (to - from) * BINS)))] += 1;
  }
  const largest = Math.max(...counts), context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = colour("--line");
  if (from < 0) context.fillRect(canvas.width / 2, 0, 1, canvas.height); // zero
  context.fillStyle = colour("--rest");
  counts.forEach((count, i) => {
    const height = Math.sqrt(count / largest) * canvas.height; // the square root keeps rare values visible
    context.fillRect(2 * i, canvas.height - height, 2, height);
  });
}

function paintWhiskers(canvas, { fixed, ofBatch }) {
  const deviation = (variance) => Math.sqrt(Math.max(0, variance));
  const low = Math.min(...fixed.mean.map((m, c) => m - deviation(fixed.variance[c])));
  const high = Math.max(...fixed.mean.map((m, c) => m + deviation(fixed.variance[c])));
  const y = (value) => canvas.height * (0.05 + 0.9 * (high - value) / (high - low));
  const context = canvas.getContext("2d"), wide = canvas.width / fixed.mean.length;
  context.clearRect(0, 0, canvas.width, canvas.height);
  [[fixed, colour("--rest"), 0.15], [ofBatch, colour("--accent"), 0.5]].forEach(([{ mean, variance }, style, at]) => {
    context.fillStyle = style;
    mean.forEach((m, c) => {
      const d = deviation(variance[c]);
      context.globalAlpha = 0.55;
      context.fillRect((c + at) * wide, y(m + d), 0.35 * wide, y(m - d) - y(m + d));
      context.globalAlpha = 1;
      context.fillRect((c + at) * wide, y(m) - 1, 0.35 * wide, 2);
    });
  });
  canvas.ariaLabel = `Mean and deviation of ${fixed.mean.length} channels, fixed and of the batch`;
}

// The answer.

function showAnswers(results, size) {
  const answers = Object.entries(results).map(([name, stages]) => [name, stages.probabilities.batch[0]]);
  for (const [name, probabilities] of answers) {
    probabilities.forEach((p, i) => {
      const cell = $("answers").tBodies[0].rows[i].querySelector(`.${name}`);
      cell.style.setProperty("--p", p);
      cell.classList.toggle("first", p === Math.max(...probabilities));
      cell.firstChild.value = p;
      cell.firstChild.textContent = percent(p);
    });
  }
  $("answers").dataset.shows = mode();
  const { fixed, batch, folded } = Object.fromEntries(answers);
  const best = (probabilities) => {
    const highest = Math.max(...probabilities);
    return `${networks.fixed.classes[probabilities.indexOf(highest)]}, ${percent(highest)}`;
  };
  $("verdict").textContent = best({ fixed, batch, folded }[mode()]);
  const difference = Math.max(...folded.map((p, i) => Math.abs(p - fixed[i])));
  $("comment").textContent = {
    fixed: "Each norm uses the mean and variance from training. The answer does not depend on the other pictures.",
    batch: size === 1
      ? "A batch of one: in a linear layer, each unit’s mean is its own value, so the third norm removes everything. Every picture gets this answer. Add other pictures!"
      : `Each norm uses the mean and variance of these ${size} pictures. Other pictures change the answer; with fixed statistics it is ${best(fixed)}.`,
    folded: `Each norm is a scale and a shift; they are now part of the weights of the layer before. The answer is the same; the largest difference is ${difference.toExponential(0)}.`,
  }[mode()];
}

function paint() {
  due = false;
  const others = pressed().flatMap((button, i) => (button.ariaPressed === "true" ? [examples[i]] : []));
  const batch = [pixels, ...others, ...kept];
  const results = {
    fixed: run(networks.fixed, batch),
    batch: run(networks.fixed, batch, true),
    folded: run(networks.folded, batch),
  };
  const ground = triple(colour("--surface").trim());
  for (const name of Object.keys(figures)) paintStage(name, results[mode()][name], ground);
  paintPixels($("given"), pixels);
  $("count").textContent = batch.length === 1 ? "no others" : `${batch.length - 1} other${batch.length === 2 ? "" : "s"}`;
  showAnswers(results, batch.length);
}

function changed() {
  if (!due) requestAnimationFrame(paint);
  due = true;
}

// The picture, and the others in its batch.

function look(values) {
  pixels = values;
  paper.clear();
  $("stage").dataset.shows = "given";
  changed();
}

function drawn() {
  $("stage").dataset.shows = "drawing";
  pixels = shrink(paper.canvas);
  changed();
}

function keep() {
  const mine = pixels.slice();
  const thumb = element("canvas", { width: SIDE, height: SIDE });
  paintPixels(thumb, mine);
  const button = element("button", { type: "button", title: "Remove", ariaLabel: "Your picture; remove it" }, thumb);
  const item = element("li", {}, button);
  button.addEventListener("click", () => {
    kept = kept.filter((picture) => picture !== mine);
    item.remove();
    changed();
  });
  kept = [...kept, mine];
  $("others").append(item);
  changed();
}

function pressAll(value) {
  for (const button of pressed()) button.ariaPressed = value;
  changed();
}

function fromAddress() { // 784 bytes in Base64; the first page links here with them
  try {
    const bytes = Uint8Array.from(atob(location.hash.slice(1)), (c) => c.charCodeAt());
    return bytes.length === SIDE ** 2 ? bytes : null;
  } catch {
    return null;
  }
}

async function load() {
  $("retry").hidden = true;
  $("error").textContent = "";
  try {
    const response = await fetch("static/run.safetensors");
    if (!response.ok) {
      const { error } = await response.json();
      $("error").textContent = error;
      return;
    }
    const network = parse(await response.arrayBuffer());
    const { model, picture_model: other } = await fetch("readyz").then((ready) => ready.json());
    $("second").hidden = other.revision === model.revision;
    networks = { fixed: network, folded: fold(network) };
    const images = [...$("examples").querySelectorAll("img")];
    examples = await Promise.all(images.map(async (image) => shrink(await rasterise(image, 280, "#fff"))));
  } catch {
    $("error").textContent = "The service cannot be reached.";
    $("retry").hidden = false;
    return;
  }
  build();
  $("control").hidden = $("network").hidden = false;
  look(fromAddress() ?? examples[4]);
}

const paper = makePaper($("paper"), drawn);
bindTools($("tools"), $("undo"), paper, drawn);
$("clear").addEventListener("click", () => {
  paper.clear();
  drawn();
});
exampleButtons($("examples"), (example) => look(examples[EXAMPLES.indexOf(example)]));
exampleButtons($("others"), (_, button) => {
  button.ariaPressed = String(button.ariaPressed !== "true");
  changed();
});
for (const button of $("others").querySelectorAll("button")) button.ariaPressed = "false";
$("statistics").addEventListener("change", changed);
$("all").addEventListener("click", () => pressAll("true"));
$("none").addEventListener("click", () => {
  kept = [];
  for (const button of $("others").querySelectorAll("button:not([aria-pressed])")) button.parentElement.remove();
  pressAll("false");
});
$("keep").addEventListener("click", keep);
$("retry").addEventListener("click", load);
addEventListener("hashchange", () => { if (fromAddress()) look(fromAddress()); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed);
load();
