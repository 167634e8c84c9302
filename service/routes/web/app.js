// Takes a picture, sends it to POST /predict, and shows the answer.

import { EXAMPLES, exampleButtons, rasterise } from "./examples.js";
import { bindTools, makePaper } from "./paper.js";
import { explain } from "./why.js";

const $ = (id) => document.getElementById(id);
const stage = $("stage");
const placeholders = ["preprocessing", "command", "latency"].map((id) => [$(id), $(id).textContent]);

let key = ""; // in memory only
let source = null; // returns the picture to send: {name, type, blob, saved}
let turn = new AbortController(); // aborted when another picture replaces this one
let shown = null; // the signal of the turn whose answer is on the page
let current = null; // that answer
let asking = false;
let changed = false; // the picture has changed since the last request
let camera = null; // the stream, while the viewfinder is open
let pause = 1000; // milliseconds until the page checks again whether the service is back
let checking; // the timer of that check

const PATIENCE = 400; // milliseconds that the old answer stays before "Looking …" replaces it
const LONGEST_PAUSE = 8000;
const MAX_SIDE = 1024; // pixels; larger pictures are scaled down, because the service uses fewer
const SENT_AS_THEY_ARE = /^image\/(png|jpeg|webp|gif|bmp|avif|unknown)$/; // some browsers read HEIC
const NO_FILE = "This is not a file. Save the picture first, then choose or drop it.";
const UNREADABLE = "The file cannot be read; choose another.";
const UNREACHABLE = "The service cannot be reached. The page tries again by itself.";

// Requests: one at a time. Strokes drawn meanwhile are sent together in the next one.

async function ask() {
  changed = true;
  if (asking) return;
  asking = true;
  $("output").ariaBusy = "true";
  clearTimeout(checking);
  while (changed && source) {
    changed = false;
    const { signal } = turn;
    const patience = setTimeout(() => { if (shown !== signal) clearAnswer("Looking …"); }, PATIENCE);
    const reply = await source().then((picture) => post(picture, signal), () => failure(UNREADABLE, 422));
    clearTimeout(patience);
    if (signal.aborted) continue;
    shown = signal;
    if (reply.status === 200) show(reply);
    else refuse(reply.status, reply.answer.error, reply.answer.request_id);
  }
  asking = false;
  $("output").ariaBusy = "false";
}

const failure = (error, status = 0) => ({ status, answer: { error } });

// fetch sends header fields in Latin-1: these characters become the key's UTF-8 bytes.
const authorization = () => key
  ? { Authorization: `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}` } : {};

async function post(picture, signal) {
  const headers = { "Content-Type": picture.type, ...authorization() };
  const begin = performance.now();
  let response;
  try {
    const request = { method: "POST", headers, body: picture.blob, signal };
    response = await fetch("predict?echo=pixels", request);
    const answer = await response.json();
    const complete = response.ok ? answer.predictions && answer.pixels : typeof answer.error === "string";
    if (!complete) throw new TypeError("not this service's answer");
    return { status: response.status, answer, picture, milliseconds: performance.now() - begin };
  } catch { // a proxy may have answered
    if (!response) return failure(UNREACHABLE);
    return failure(`The server that answered is not the service: ${response.status} ${response.statusText}.`);
  }
}

function waitForService() {
  clearTimeout(checking);
  checking = setTimeout(async () => {
    const back = await fetch("readyz").then((response) => response.ok, () => false);
    if (back) ask();
    else waitForService();
  }, pause);
  pause = Math.min(2 * pause, LONGEST_PAUSE);
}

// Showing.

const percent = (p) => `${(100 * p).toFixed(1)} %`;
const megabytes = (_, number) => `${+(number.replaceAll(",", "") / 2 ** 20).toFixed(1)} MB`;
const forPeople = (sentence, id) => sentence // people know the body as their file, and see no header fields
  .replace("The body", "The file").replace("the request id", `the request id ${id}`).replace(/(\d+(?:,\d{3}){2,}|\d{7,}) bytes/g, megabytes);

function show({ answer, picture, milliseconds }) {
  refuse(200, "");
  hideReason();
  current = answer;
  pause = 1000;
  const notes = answer.notes ?? [];
  const pixels = answer.pixels.flat();
  const blank = pixels.every((gray) => gray === pixels[0]); // an erased drawing, a white sheet
  const unsure = blank || notes.some((note) => note.startsWith("Not sure"));
  const name = document.createElement("span");
  name.textContent = answer.label;
  if (blank) name.textContent = "No garment";
  $("label").replaceChildren(unsure && !blank ? "Not sure: perhaps " : "", name);
  $("output").classList.toggle("unsure", unsure);
  answer.predictions.forEach(({ label, probability }, rank) => fillBar(rank, label, probability));
  $("bars").children[0].className = "first";
  const seen = new ImageData(28, 28);
  pixels.forEach((gray, i) => seen.data.set([gray, gray, gray, 255], 4 * i));
  $("seen").getContext("2d").putImageData(seen, 0, 0);
  $("seen").parentElement.classList.add("full");
  $("preprocessing").textContent = (picture.scaled ? "Scaled down in your browser. " : "")
    + (answer.preprocessing === "none"
      ? "What the model saw: your 28\u00a0×\u00a028 grey pixels, unchanged."
      : "What the model saw: 28\u00a0×\u00a028 grey pixels, made the way the data set was made.");
  $("notes").replaceChildren(...notes.map((note) => {
    const item = document.createElement("li");
    item.textContent = note;
    return item;
  }));
  $("latency").textContent = `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms`;
  $("why").disabled = false;
  const bytes = btoa(String.fromCharCode(...pixels));
  for (const link of document.querySelectorAll("a.inside")) link.href = `inside#${bytes}`;
  showModel();
  showCommand(picture);
  speak(blank ? name.textContent : `${$("label").textContent}, ${percent(answer.confidence)}`);
}

function fillBar(rank, label, probability) {
  const [name, bar, number] = $("bars").children[rank].children;
  name.textContent = label;
  bar.style.setProperty("--p", probability);
  number.textContent = percent(probability);
}

function refuse(status, sentence, id) {
  const aboutKey = key ? "The service does not accept this key." : "The service needs an API key.";
  $("error").textContent = status === 401 ? aboutKey : forPeople(sentence, id);
  $("key-form").hidden = status !== 401;
  if (status === 401) $("key").focus();
  if (status !== 200) clearAnswer("No answer");
  const temporary = status === 0 || status >= 500 || status === 408 || status === 429;
  $("retry").hidden = !temporary;
  clearTimeout(checking);
  if (temporary) waitForService();
}

function clearAnswer(instead) {
  current = null;
  $("label").textContent = instead;
  $("output").classList.remove("unsure");
  for (const [element, text] of placeholders) element.textContent = text;
  for (const bar of $("bars").children) {
    bar.className = "";
    bar.children[1].style.setProperty("--p", 0);
    bar.children[2].textContent = "";
  }
  $("seen").getContext("2d").clearRect(0, 0, 28, 28);
  $("seen").parentElement.classList.remove("full");
  $("notes").replaceChildren();
  $("copy").disabled = $("save").hidden = $("why").disabled = true;
  hideReason();
  speak("");
}

let speaking;
function speak(text) { // once for several strokes
  clearTimeout(speaking);
  speaking = setTimeout(() => { $("spoken").textContent = text; }, 500);
}

let models = []; // for pixels, and for pictures that the service converts
async function showModel() { // the one that answered
  const answered = () => models.find(({ revision }) => revision === current?.model.revision);
  if (!answered()) {
    const ready = await fetch("readyz").then((response) => response.json()).catch(() => ({}));
    models = [ready.model, ready.picture_model].filter(Boolean);
  }
  const model = answered() ?? models[0];
  if (!model) return;
  $("model").textContent = `${model.name} ${model.version}`;
  $("revision").textContent = model.revision;
  $("accuracy").textContent = Number(model.test_accuracy) ? percent(model.test_accuracy) : "unknown";
  $("provider").textContent = model.provider.replace("ExecutionProvider", "");
}

$("bars").append(...EXAMPLES.map(({ label }) => {
  const row = document.createElement("li");
  row.append(...["span", "i", "span"].map((name) => document.createElement(name)));
  row.firstChild.textContent = label;
  return row;
}));
$("retry").addEventListener("click", () => ask());

// Why.

function hideReason() {
  $("heat").hidden = true;
  $("reason").textContent = "";
  $("why").ariaPressed = "false";
}

$("why").addEventListener("click", async () => {
  const answer = current;
  if ($("why").ariaPressed === "true") return hideReason();
  $("why").ariaPressed = "true";
  const sentence = await explain(answer, authorization(), $("heat")).catch(() => "");
  if (current !== answer || $("why").ariaPressed !== "true") return undefined;
  if (!sentence) hideReason();
  else $("heat").hidden = false;
  $("reason").textContent = sentence || "The service did not answer; try again.";
  return undefined;
});

// The command that sends the same picture.

const code = (c) => `'$'\\x${c.charCodeAt().toString(16).padStart(2, "0")}''`;
const quoted = (word) => /^[\w@%+=:,./-]+$/.test(word) ? word
  : `'${word.replaceAll("'", "'\\''").replace(/[\0-\x1f\x7f]/g, code)}'`; // control characters are escaped

function showCommand({ name, type, blob, saved }) {
  const lines = [
    `curl ${quoted(new URL("predict", location.href).href)}`,
    `-H ${quoted(`Content-Type: ${type}`)}`,
    `--data-binary ${quoted(name === "-" ? "@./-" : `@${name}`)}`, // "@-" is standard input
  ];
  if (key) lines.splice(1, 0, '-H "Authorization: Bearer $BNLENET_API_KEY"');
  $("command").textContent = lines.join(" \\\n  ");
  $("copy").disabled = false;
  $("save").hidden = saved;
  URL.revokeObjectURL($("save").href);
  $("save").href = URL.createObjectURL(blob);
  $("save").download = name;
}

$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("command").textContent);
  } catch { // browsers have a clipboard only at secure addresses
    getSelection().selectAllChildren($("command"));
    document.execCommand("copy");
  }
  $("copied").textContent = "Copied.";
  setTimeout(() => { $("copied").textContent = ""; }, 2000);
});

// A picture is an example, or one that is chosen, dropped, pasted or taken.

function begin(shows, next) {
  turn.abort();
  turn = new AbortController();
  source = next;
  closeCamera();
  stage.dataset.shows = shows;
  if (shows !== "drawing") paper.clear();
  $("clear").disabled = shows === "nothing";
  $("undo").disabled = shows !== "drawing";
}

const encode = (canvas, type) => new Promise((done) => { canvas.toBlob(done, type, 0.92); });

async function prepare(file, type, saved) {
  await file.slice(0, 1).arrayBuffer(); // fails for a folder, and for a file that was moved
  const picture = { name: file.name, type, blob: file, saved };
  const bitmap = await createImageBitmap(file).catch(() => null); // turns it upright; null for other files
  if (!bitmap) return picture; // the service knows more formats, or says what is wrong
  const scale = MAX_SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale < 1 || !SENT_AS_THEY_ARE.test(type)) {
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(Math.min(1, scale) * bitmap.width));
    canvas.height = Math.max(1, Math.round(Math.min(1, scale) * bitmap.height));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    const kind = type === "image/jpeg" ? "jpeg" : "png"; // other formats may have transparency
    picture.name = `${file.name.replace(/\.[^.]*$/, "")}-small.${kind}`;
    picture.type = `image/${kind}`;
    picture.blob = await encode(canvas, picture.type);
    picture.saved = false;
    picture.scaled = scale < 1;
  }
  bitmap.close();
  return picture;
}

function take(file, saved = true) {
  if (!file) return;
  // The service finds the format in the content. The type says only: read it as a picture.
  const type = file.type.startsWith("image/") ? file.type : "image/unknown";
  let prepared;
  begin("picture", () => (prepared ??= prepare(file, type, saved)));
  showPicture(URL.createObjectURL(file), file.name);
  ask();
}

function showPicture(url, name) {
  URL.revokeObjectURL($("picture").src);
  $("picture").src = url;
  $("picture").alt = $("file-name").textContent = name;
}

$("picture").addEventListener("error", () => { // show the name, not a broken image
  if (stage.dataset.shows === "picture") stage.dataset.shows = "name";
});

exampleButtons($("examples"), (example, button) => {
  begin("picture", async () => {
    const blob = await encode(await rasterise(button.firstChild, 400), "image/png");
    return { name: `${example.name}.png`, type: "image/png", blob, saved: false };
  });
  showPicture(example.url, example.label);
  ask();
});

for (const input of [$("file"), $("camera")]) {
  input.addEventListener("change", () => {
    take(input.files[0], input === $("file"));
    input.value = ""; // so that the same file can be chosen again
  });
}
addEventListener("paste", (event) => take(event.clipboardData.files[0], false));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    const left = kind === "drop" || (kind === "dragleave" && !event.relatedTarget);
    stage.classList.toggle("over", !left); // moving to another element is not leaving
    if (kind !== "drop") return;
    take(event.dataTransfer.files[0]);
    if (!event.dataTransfer.files.length) $("error").textContent = NO_FILE;
  });
}

// The camera. Phones open their own camera application, which is better than a viewfinder here.
// Browsers offer the viewfinder only to pages at secure addresses.

const ownCamera = () => matchMedia("(pointer: coarse)").matches || !navigator.mediaDevices;

$("camera").addEventListener("click", async (event) => {
  if (ownCamera()) return;
  event.preventDefault();
  if (camera) return shoot();
  begin("nothing", null);
  clearAnswer("Hold it up");
  refuse(200, "");
  const { signal } = turn;
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    if (signal.aborted) return stream.getTracks().forEach((track) => track.stop());
    camera = stream;
    $("viewfinder").srcObject = camera;
    stage.dataset.shows = "camera";
    $("clear").disabled = false;
    $("camera").labels[0].firstChild.data = "Take it";
    await $("viewfinder").play();
  } catch {
    if (!signal.aborted) refuse(422, "The camera cannot be used: there is none, or the page may not use it.");
  }
  return undefined;
});

async function shoot() {
  const { videoWidth: width, videoHeight: height } = $("viewfinder");
  if (!width) return;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  canvas.getContext("2d").drawImage($("viewfinder"), 0, 0);
  const blob = await encode(canvas, "image/jpeg");
  take(new File([blob], "photo.jpeg", { type: "image/jpeg" }), false);
}

function closeCamera() {
  camera?.getTracks().forEach((track) => track.stop());
  camera = null;
  $("camera").labels[0].firstChild.data = "Camera";
}

// A drawing is sent black on white, also in the dark scheme.

const drawing = async () => ({
  name: "drawing.png",
  type: "image/png",
  blob: await encode($("paper"), "image/png"),
  saved: false,
});

function drawn() {
  if (paper.empty) return clear();
  if (stage.dataset.shows !== "drawing") begin("drawing", drawing);
  return ask();
}

function clear() {
  begin("nothing", null);
  refuse(200, "");
  clearAnswer("Show me a garment");
}

const paper = makePaper($("paper"), drawn);
bindTools($("tools"), $("undo"), paper, drawn);
$("tools").addEventListener("click", ({ target }) => {
  const asks = target.name === "tool" && !["drawing", "nothing"].includes(stage.dataset.shows);
  if (asks) clear(); // who takes a pen wants to draw
});
$("clear").addEventListener("click", () => {
  clear();
  document.querySelector("[name=tool]:checked").focus(); // it is near, so that nothing scrolls
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  ask();
});

clear();
showModel();
