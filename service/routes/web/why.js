// Why the model gave its answer: an occlusion map, made by covering parts of the picture in turn. All
// covered pictures go into one request of the Open Inference Protocol, as a binary tensor.

const SIDE = 28;
const PATCH = 6; // pixels; the side of the covered square
const STEPS = 10; // positions of the square in each direction
const PLACES = Array.from({ length: STEPS ** 2 }, (_, i) =>
  [i % STEPS, Math.floor(i / STEPS)].map((step) => Math.round(step * (SIDE - PATCH) / (STEPS - 1))));
const SUPPORTS = [255, 120, 40], OPPOSES = [70, 140, 255];
const MIN_LOSS = 0.05; // log-odds; a smaller loss is not shown

/**
 * Draws which parts the answer depends on, and returns a sentence about it.
 *
 * @param answer of POST /predict, with its pixels
 * @param headers that the service needs
 * @param canvas square, over the pixels
 */
export async function explain(answer, headers, canvas) {
  const pixels = answer.pixels.flat();
  const images = [pixels, ...PLACES.map(([left, top]) => pixels.map((value, i) => {
    const x = (i % SIDE) - left, y = Math.floor(i / SIDE) - top;
    return x >= 0 && x < PATCH && y >= 0 && y < PATCH ? 0 : value;
  }))];
  const [whole, ...covered] = await probabilities(answer, images, headers);
  const odds = (row) => { // log-odds of the answer's class against all others
    const others = row.reduce((sum, p, i) => (i === answer.class_id ? sum : sum + p), 0);
    return Math.log(row[answer.class_id] + 1e-12) - Math.log(others + 1e-12);
  };
  const losses = covered.map((row) => odds(whole) - odds(row));
  draw(canvas, losses);
  const worst = losses.indexOf(Math.max(...losses));
  if (losses[worst] < MIN_LOSS) return "No single part matters: without any one of them, the answer stays.";
  frame(canvas, PLACES[worst]);
  const row = covered[worst];
  const then = row.indexOf(Math.max(...row));
  const label = answer.predictions.find((prediction) => prediction.class_id === then)?.label ?? "another";
  const stays = then === answer.class_id ? `still ${label}` : label;
  return "Orange speaks for it, blue against it.\n"
    + `Without the framed part: ${stays}, ${(100 * row[then]).toFixed(1)} %.`;
}

async function probabilities({ model, preprocessing }, images, headers) {
  const data = Uint8Array.from(images.flat());
  const head = JSON.stringify({
    inputs: [{
      name: "pixels",
      shape: [images.length, 1, SIDE, SIDE],
      datatype: "UINT8",
      parameters: { binary_data_size: data.length },
    }],
    outputs: [{ name: "probabilities", parameters: { binary_data: true } }],
    parameters: { preprocessing },
  });
  const response = await fetch(`v2/models/${model.name}/infer`, {
    method: "POST",
    headers: { ...headers, "Content-Type": "application/octet-stream", "Inference-Header-Content-Length": head.length },
    body: new Blob([head, data]),
  });
  if (!response.ok) throw new Error("no answer");
  const start = Number(response.headers.get("Inference-Header-Content-Length"));
  const floats = new Float32Array((await response.arrayBuffer()).slice(start));
  return images.map((_, i) => [...floats.slice(10 * i, 10 * i + 10)]);
}

function draw(canvas, losses) {
  const sums = new Float64Array(SIDE ** 2), counts = new Float64Array(SIDE ** 2);
  PLACES.forEach(([left, top], place) => {
    for (let i = 0; i < PATCH ** 2; i += 1) {
      const at = (top + Math.floor(i / PATCH)) * SIDE + left + (i % PATCH);
      sums[at] += losses[place];
      counts[at] += 1;
    }
  });
  const means = sums.map((sum, i) => sum / counts[i]);
  const largest = Math.max(MIN_LOSS, ...means.map(Math.abs));
  const heat = new ImageData(SIDE, SIDE);
  means.forEach((mean, i) => {
    heat.data.set([...(mean > 0 ? SUPPORTS : OPPOSES), 220 * Math.abs(mean) / largest], 4 * i);
  });
  const small = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  small.getContext("2d").putImageData(heat, 0, 0);
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
}

function frame(canvas, [left, top]) {
  const scale = canvas.width / SIDE, context = canvas.getContext("2d");
  context.strokeStyle = "#fff";
  context.lineWidth = 3;
  context.strokeRect(left * scale, top * scale, PATCH * scale, PATCH * scale);
}
