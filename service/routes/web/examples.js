// The ten examples: one drawn garment for each class, in the order of the classes.

export const EXAMPLES = [
  ["t-shirt", "T-shirt/top"],
  ["trouser", "Trouser"],
  ["pullover", "Pullover"],
  ["dress", "Dress"],
  ["coat", "Coat"],
  ["sandal", "Sandal"],
  ["shirt", "Shirt"],
  ["sneaker", "Sneaker"],
  ["bag", "Bag"],
  ["ankle-boot", "Ankle boot"],
].map(([name, label]) => ({ name, label, url: `static/${name}.svg` }));

/** Returns a canvas with an example's image, on a colour or on a transparent ground. */
export async function rasterise(image, side, ground) {
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side });
  const context = canvas.getContext("2d");
  if (ground) {
    context.fillStyle = ground;
    context.fillRect(0, 0, side, side);
  }
  context.drawImage(image, 0, 0, side, side);
  return canvas;
}

/** Fills a list with a button for each example; a click calls `chosen(example, button)`. */
export function exampleButtons(list, chosen) {
  for (const example of EXAMPLES) {
    const item = document.createElement("li");
    const button = Object.assign(document.createElement("button"), { type: "button", title: example.label });
    button.append(Object.assign(new Image(), { src: example.url, alt: example.label, draggable: false }));
    button.addEventListener("click", () => chosen(example, button));
    item.append(button);
    list.append(item);
  }
}
