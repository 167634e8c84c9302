// Runs the chapter's network, LeNet with batch norm, in plain JavaScript with the weights of a run.

const EPSILON = 1e-5; // as in training/batch_norm.py
const NORMS = ["norm1", "norm2", "norm3", "norm4"];
const LAYER_BEFORE = { norm1: "conv1", norm2: "conv2", norm3: "linear1", norm4: "linear2" };

/** Reads a safetensors file: the header's length in eight bytes, the header as JSON, raw floats. */
export function parse(buffer) {
  const view = new DataView(buffer);
  const start = 8 + Number(view.getBigUint64(0, true));
  const { __metadata__: about, ...entries } = JSON.parse(new TextDecoder().decode(buffer.slice(8, start)));
  const tensors = {};
  for (const [name, { dtype, data_offsets: [from, to] }] of Object.entries(entries)) {
    if (dtype !== "F32") continue;
    tensors[name] = Float64Array.from({ length: (to - from) / 4 }, (_, i) =>
      view.getFloat32(start + from + 4 * i, true));
  }
  for (const norm of NORMS) { // the statistics that the export used
    const moving = about.statistics === "moving";
    tensors[`${norm}.mean`] = tensors[moving ? `${norm}.running_mean` : `${about.statistics}.${norm}.mean`];
    tensors[`${norm}.variance`] = tensors[moving ? `${norm}.running_var` : `${about.statistics}.${norm}.variance`];
  }
  return { tensors, revision: about.revision, temperature: Number(about.temperature), classes: JSON.parse(about.classes) };
}

/** Returns the network with each norm folded into the weights and bias of the layer before it. */
export function fold({ tensors, ...rest }) {
  const folded = { ...tensors };
  for (const norm of NORMS) {
    const layer = LAYER_BEFORE[norm];
    const [weight, bias, gamma, beta, mean, variance] = [`${layer}.weight`, `${layer}.bias`,
      `${norm}.weight`, `${norm}.bias`, `${norm}.mean`, `${norm}.variance`].map((name) => tensors[name]);
    const scale = gamma.map((g, c) => g / Math.sqrt(variance[c] + EPSILON));
    const inputs = weight.length / bias.length;
    folded[`${layer}.weight`] = weight.map((w, i) => w * scale[Math.floor(i / inputs)]);
    folded[`${layer}.bias`] = bias.map((b, c) => (b - mean[c]) * scale[c] + beta[c]);
  }
  return { ...rest, tensors: folded, folded: true };
}

/**
 * Runs the network over a batch.
 *
 * @param network of `parse` or `fold`
 * @param images of 784 pixels from 0 to 255
 * @param own whether the norms use the batch's statistics, as in training
 * @returns for each stage, the values of every image; for norms, both statistics too
 */
export function run({ tensors, temperature, folded }, images, own = false) {
  const stages = {};
  const apply = (name, channels, step) => {
    batch = batch.map(step);
    stages[name] = { channels, batch };
  };
  const layer = (name, step) => {
    const weight = tensors[`${name}.weight`], bias = tensors[`${name}.bias`];
    apply(name, bias.length, (values) => step(values, weight, bias));
  };
  const normThenSigmoid = (number) => {
    const name = `norm${number}`, channels = tensors[`${name}.bias`].length;
    if (!folded) {
      const fixed = { mean: tensors[`${name}.mean`], variance: tensors[`${name}.variance`] };
      const ofBatch = statistics(batch, channels);
      const { mean, variance } = own ? ofBatch : fixed;
      const gamma = tensors[`${name}.weight`], beta = tensors[`${name}.bias`];
      apply(name, channels, (values) => values.map((value, i) => {
        const c = Math.floor(i / (values.length / channels));
        return gamma[c] * (value - mean[c]) / Math.sqrt(variance[c] + EPSILON) + beta[c];
      }));
      Object.assign(stages[name], { fixed, ofBatch });
    }
    apply(`sigmoid${number}`, channels, (values) => values.map((value) => 1 / (1 + Math.exp(-value))));
  };
  let batch = images.map((pixels) => Float64Array.from(pixels, (value) => value / 255));
  stages.input = { channels: 1, batch };
  for (const number of [1, 2]) {
    layer(`conv${number}`, convolve);
    normThenSigmoid(number);
    const { channels } = stages[`sigmoid${number}`];
    apply(`pool${number}`, channels, (values) => pool(values, channels));
  }
  layer("linear1", multiply);
  normThenSigmoid(3);
  layer("linear2", multiply);
  normThenSigmoid(4);
  layer("linear3", multiply);
  apply("probabilities", 10, (logits) => softmax(logits.map((value) => value / temperature)));
  return stages;
}

function convolve(values, weight, bias) { // 5 x 5, no padding
  const inputs = weight.length / bias.length / 25;
  const side = Math.sqrt(values.length / inputs), out = side - 4;
  const result = new Float64Array(bias.length * out * out);
  for (let c = 0; c < bias.length; c += 1) {
    for (let y = 0; y < out; y += 1) {
      for (let x = 0; x < out; x += 1) {
        let sum = bias[c];
        for (let d = 0; d < inputs; d += 1) {
          for (let v = 0; v < 5; v += 1) {
            const from = (d * side + y + v) * side + x, by = ((c * inputs + d) * 5 + v) * 5;
            for (let u = 0; u < 5; u += 1) sum += values[from + u] * weight[by + u];
          }
        }
        result[(c * out + y) * out + x] = sum;
      }
    }
  }
  return result;
}

function pool(values, channels) { // the mean of 2 x 2
  const side = Math.sqrt(values.length / channels), out = side / 2;
  return Float64Array.from({ length: channels * out * out }, (_, i) => {
    const c = Math.floor(i / out / out), y = Math.floor(i / out) % out, x = i % out;
    const at = (c * side + 2 * y) * side + 2 * x;
    return (values[at] + values[at + 1] + values[at + side] + values[at + side + 1]) / 4;
  });
}

function multiply(values, weight, bias) {
  return bias.map((b, row) => values.reduce((sum, value, i) => sum + value * weight[row * values.length + i], b));
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = logits.map((value) => Math.exp(value - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

/** Returns the mean and the variance (divided by n) of each channel over images and places. */
function statistics(batch, channels) {
  const places = batch[0].length / channels, count = batch.length * places;
  const over = (c, what) => batch.reduce((sum, values) =>
    values.subarray(c * places, (c + 1) * places).reduce((s, value) => s + what(value), sum), 0) / count;
  const mean = new Float64Array(channels).map((_, c) => over(c, (value) => value));
  return { mean, variance: mean.map((m, c) => over(c, (value) => (value - m) ** 2)) };
}
