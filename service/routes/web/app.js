// Takes a picture in any of four ways, asks POST /predict, and shows what it answers.

const $ = (id) => document.getElementById(id);
const stage = $("stage");
const pen = $("paper").getContext("2d");
const bars = [...$("bars").children];
const untouched = ["preprocessing", "command", "latency"].map((id) => [$(id), $(id).textContent]);

let key = ""; // in memory only
let source = null; // gives the picture to send: {name, type, blob, saved}
let turn = new AbortController(); // ends when another picture takes its place
let shown = null; // the signal of the turn whose answer is on the page
let asking = false;
let wanted = false;

const PATIENCE = 400; // milliseconds until the former answer gives way to the word that one is awaited
const UNREADABLE = "The file cannot be read; choose another.";
const UNREACHABLE = "The service cannot be reached; try again in a moment.";

// Asking: one request at a time. What is drawn meanwhile is sent together when it is answered.

async function ask() {
  wanted = true;
  if (asking) return;
  asking = true;
  $("output").ariaBusy = "true";
  while (wanted && source) {
    wanted = false;
    const { signal } = turn;
    const patience = setTimeout(() => { if (shown !== signal) forget("Looking …"); }, PATIENCE);
    const reply = await source().then((picture) => post(picture, signal), () => failure(UNREADABLE));
    clearTimeout(patience);
    if (signal.aborted) continue;
    shown = signal;
    if (reply.status === 200) show(reply);
    else refuse(reply.status, reply.answer.error);
  }
  asking = false;
  $("output").ariaBusy = "false";
}

const failure = (error) => ({ status: 0, answer: { error } });

async function post(picture, signal) {
  const headers = { "Content-Type": picture.type };
  // Header fields are sent in Latin-1, the letters whose bytes are the key's UTF-8.
  if (key) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
  const begin = performance.now();
  let response;
  try {
    const request = { method: "POST", headers, body: picture.blob, signal };
    response = await fetch("predict?echo=pixels", request);
    const answer = await response.json();
    const complete = response.ok ? answer.predictions && answer.pixels : answer.error;
    if (!complete) throw new TypeError("not this service's answer");
    return { status: response.status, answer, picture, milliseconds: performance.now() - begin };
  } catch { // a proxy in between may answer anything
    if (!response) return failure(UNREACHABLE);
    return failure(`What answered is not the service: ${response.status} ${response.statusText}.`);
  }
}

// Showing.

const percent = (p) => `${(100 * p).toFixed(1)} %`;

function show({ answer, picture, milliseconds }) {
  refuse(200, "");
  $("label").textContent = answer.label;
  for (const { class_id, label, probability } of answer.predictions) {
    const [name, bar, number] = bars[class_id].children;
    name.textContent = label;
    bar.style.setProperty("--p", probability);
    number.textContent = percent(probability);
    bars[class_id].classList.toggle("first", class_id === answer.class_id);
  }
  const seen = new ImageData(28, 28);
  answer.pixels.flat().forEach((gray, i) => seen.data.set([gray, gray, gray, 255], 4 * i));
  $("seen").getContext("2d").putImageData(seen, 0, 0);
  $("preprocessing").textContent = answer.preprocessing === "none"
    ? "Taken as it came: 28\u00a0×\u00a028 pixels, in grey."
    : "Converted the way the data set was made: 28\u00a0×\u00a028 pixels, in grey, light on dark.";
  $("notes").replaceChildren(...(answer.notes ?? []).map((note) => {
    const item = document.createElement("li");
    item.textContent = note;
    return item;
  }));
  $("latency").textContent = `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms`;
  if (answer.model.revision !== $("revision").textContent) tellModel();
  tellCommand(picture);
  speak(`${answer.label}, ${percent(answer.confidence)}`);
}

function refuse(status, sentence) {
  const aboutKey = key ? "The service does not accept this key." : "The service wants an API key.";
  // The service says "body" of what people know as their file.
  $("error").textContent = status === 401 ? aboutKey : sentence.replace("The body", "The file");
  $("key-form").hidden = status !== 401;
  if (status === 401) $("key").focus();
  if (status !== 200) forget("No answer");
}

function forget(instead) {
  $("label").textContent = instead;
  for (const [element, text] of untouched) element.textContent = text;
  for (const bar of bars) {
    bar.classList.remove("first");
    bar.children[1].style.setProperty("--p", 0);
    bar.children[2].textContent = "";
  }
  $("seen").getContext("2d").clearRect(0, 0, 28, 28);
  $("notes").replaceChildren();
  $("copy").disabled = $("save").hidden = true;
  speak("");
}

let speaking;
function speak(text) { // not at every stroke
  clearTimeout(speaking);
  speaking = setTimeout(() => { $("spoken").textContent = text; }, 500);
}

async function tellModel() {
  const { model } = await fetch("readyz").then((response) => response.json()).catch(() => ({}));
  if (!model) return;
  $("model").textContent = `${model.name} ${model.version}`;
  $("revision").textContent = model.revision;
  $("accuracy").textContent = Number(model.test_accuracy) ? percent(model.test_accuracy) : "unknown";
  $("provider").textContent = model.provider.replace("ExecutionProvider", "");
}

// The command line for what was sent.

const code = (c) => `'$'\\x${c.charCodeAt().toString(16).padStart(2, "0")}''`;
const quoted = (word) => /^[\w@%+=:,./-]+$/.test(word) ? word
  : `'${word.replaceAll("'", "'\\''").replace(/[\0-\x1f\x7f]/g, code)}'`; // no terminal gets those raw

function tellCommand({ name, type, blob, saved }) {
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
  } catch { // only secure addresses have a clipboard
    getSelection().selectAllChildren($("command"));
    document.execCommand("copy");
  }
  $("copied").textContent = "Copied.";
  setTimeout(() => { $("copied").textContent = ""; }, 2000);
});

// A picture: chosen, dropped or pasted.

function begin(shows, next) {
  turn.abort();
  turn = new AbortController();
  source = next;
  stage.dataset.shows = shows;
  $("clear").disabled = shows === "nothing";
}

function take(file, saved = true) {
  if (!file) return;
  // The service goes by the content; this only says that it is to be read as a picture.
  const type = file.type.startsWith("image/") ? file.type : "image/unknown";
  begin("picture", async () => {
    await file.slice(0, 1).arrayBuffer(); // fails for a folder, and for what was moved away
    return { name: file.name, type, blob: file, saved };
  });
  URL.revokeObjectURL($("picture").src);
  $("picture").src = URL.createObjectURL(file);
  $("picture").alt = $("file-name").textContent = file.name;
  ask();
}

$("picture").addEventListener("error", () => { // not a broken image's icon
  if (stage.dataset.shows === "picture") stage.dataset.shows = "name";
});

$("file").addEventListener("change", () => {
  take($("file").files[0]);
  $("file").value = ""; // the same file may be chosen again
});
addEventListener("paste", (event) => take(event.clipboardData.files[0], false));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    const left = kind === "drop" || (kind === "dragleave" && !event.relatedTarget);
    stage.classList.toggle("over", !left); // going from one element to the next is not leaving
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
}

// A drawing: black on white, whatever the scheme shows.

const drawing = async () => ({
  name: "drawing.png",
  type: "image/png",
  blob: await new Promise((done) => { pen.canvas.toBlob(done, "image/png"); }),
  saved: false,
});

function clear() {
  begin("nothing", null);
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, pen.canvas.width, pen.canvas.height);
  refuse(200, "");
  forget("Show me one");
}

let last = null; // where the pen is on the paper
function draw(event) {
  const { left, top, width } = pen.canvas.getBoundingClientRect();
  const scale = pen.canvas.width / width;
  const point = [(event.clientX - left) * scale, (event.clientY - top) * scale];
  pen.beginPath();
  pen.moveTo(...(last ?? point));
  pen.lineTo(point[0], point[1] + 0.01); // a line of no length would leave no dot
  pen.stroke();
  last = point;
}

pen.lineCap = "round";
pen.lineWidth = 52; // as wide as a sleeve, so that a garment is soon filled in
pen.canvas.addEventListener("pointerdown", (event) => {
  if (event.button || !event.isPrimary) return; // a second finger is no second pen
  pen.canvas.setPointerCapture(event.pointerId);
  if (stage.dataset.shows === "nothing") begin("drawing", drawing);
  last = null;
  draw(event);
  ask();
});
pen.canvas.addEventListener("pointermove", (event) => {
  if (!pen.canvas.hasPointerCapture(event.pointerId)) return;
  const between = event.getCoalescedEvents?.() ?? []; // only secure addresses have it
  for (const each of between.length ? between : [event]) draw(each);
  ask();
});

$("clear").addEventListener("click", () => { clear(); $("file").focus(); });
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  ask();
});

clear();
tellModel();
