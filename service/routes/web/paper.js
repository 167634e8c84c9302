// Paper to draw on with a mouse, a pen or a finger, black on white. What a stroke encloses is filled,
// lighter than the lines, so that a collar or a seam drawn on it still shows.

export const TOOLS = {
  fine: { width: 14, color: "#000" },
  broad: { width: 48, color: "#000" },
  eraser: { width: 36, color: "#fff" },
};
const FILLING = "#464646";
const CELL = 4; // pixels; whether a place is enclosed is found out on cells of this size
const REACH = 2; // cells; gaps of twice as many count as closed
const NEAR = 60; // pixels; a long line that ends so near its beginning is closed

/** Makes a square canvas such paper; `changed` is called after every change by hand. */
export function makePaper(canvas, changed) {
  const side = canvas.width / CELL;
  const wide = side + 2 * (REACH + 1); // a rim around all, so that the outside is in one piece
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const small = Object.assign(document.createElement("canvas"), { width: side, height: side })
    .getContext("2d", { willReadFrequently: true });
  let strokes = [];
  let stroke = null; // the one being drawn
  let before; // what was enclosed when it began
  pen.lineCap = pen.lineJoin = "round";

  function line({ tool, points }, from = 0) { // piece by piece, as it is drawn
    pen.strokeStyle = tool.color;
    pen.lineWidth = tool.width;
    for (let i = from; i < points.length; i += 1) {
      const [x, y] = points[i];
      pen.beginPath();
      pen.moveTo(...points[Math.max(0, i - 1)]);
      pen.lineTo(x, y + 0.01); // a line of no length would leave no dot
      pen.stroke();
    }
  }

  function fill({ cells }) {
    pen.fillStyle = FILLING;
    pen.globalCompositeOperation = "darken"; // the lines stay as they are
    for (const i of cells) {
      const x = (i % wide) - REACH - 1, y = Math.floor(i / wide) - REACH - 1;
      pen.fillRect((x - 1) * CELL, (y - 1) * CELL, 3 * CELL, 3 * CELL); // up to the middle of the line
    }
    pen.globalCompositeOperation = "source-over";
  }

  function repaint() {
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    for (const each of strokes) {
      line(each);
      fill(each);
    }
  }

  /** Tells for each cell whether no way leads there from outside, once small gaps are closed. */
  function enclosed() {
    small.drawImage(canvas, 0, 0, side, side);
    const { data } = small.getImageData(0, 0, side, side);
    const ink = new Uint8Array(wide * wide);
    for (let i = 0; i < side * side; i += 1) {
      const at = (Math.floor(i / side) + REACH + 1) * wide + (i % side) + REACH + 1;
      ink[at] = data[4 * i] < 200;
    }
    const grow = (cells) => { // by one in all eight directions
      const rows = cells.map((c, i) => c | cells[i - 1] | cells[i + 1]);
      return rows.map((c, i) => c | rows[i - wide] | rows[i + wide]);
    };
    let walls = ink;
    for (let i = 0; i < REACH; i += 1) walls = grow(walls);
    const outside = new Uint8Array(wide * wide);
    const open = [0];
    while (open.length) {
      const at = open.pop();
      if (outside[at] !== 0 || walls[at] !== 0) continue; // undefined beyond the rim
      outside[at] = 1;
      open.push(at - 1, at + 1, at - wide, at + wide);
    }
    let inside = walls.map((c, i) => !c && !outside[i]); // a gap that leads nowhere is no inside
    for (let i = 0; i <= REACH; i += 1) inside = grow(inside); // and one more for the corners
    return inside.map((c, i) => c && !ink[i]);
  }

  function move(event) {
    const { left, top, width } = canvas.getBoundingClientRect();
    const scale = canvas.width / width;
    stroke.points.push([(event.clientX - left) * scale, (event.clientY - top) * scale]);
    line(stroke, stroke.points.length - 1);
  }

  function end() {
    if (!stroke) return;
    const { points, tool } = stroke;
    if (tool !== TOOLS.eraser) {
      const steps = points.slice(1).map(([x, y], i) => Math.hypot(x - points[i][0], y - points[i][1]));
      const gap = Math.hypot(points.at(-1)[0] - points[0][0], points.at(-1)[1] - points[0][1]);
      if (gap < NEAR && steps.reduce((a, b) => a + b, 0) > 4 * NEAR) {
        points.push(points[0]);
        line(stroke, points.length - 1);
      }
      // Not what was enclosed before: someone may have rubbed a hole there.
      enclosed().forEach((now, i) => { if (now && !before[i]) stroke.cells.push(i); });
      fill(stroke);
    }
    stroke = null;
    changed();
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button || !event.isPrimary) return; // a second finger is no second pen
    canvas.setPointerCapture(event.pointerId);
    before = enclosed();
    stroke = { tool: TOOLS[paper.tool], points: [], cells: [] };
    strokes.push(stroke);
    move(event);
    changed();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!stroke || !canvas.hasPointerCapture(event.pointerId)) return;
    const between = event.getCoalescedEvents?.() ?? []; // only secure addresses have it
    for (const each of between.length ? between : [event]) move(each);
    changed();
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, end);

  const paper = {
    canvas,
    tool: "fine",
    get empty() { return strokes.length === 0; },
    undo() {
      if (stroke) return;
      strokes.pop();
      repaint();
    },
    clear() {
      strokes = [];
      stroke = null;
      repaint();
    },
  };
  repaint();
  return paper;
}

/** Makes the tools work: radio buttons named `tool`, a button that takes the last stroke back. */
export function bindTools(form, undo, paper, changed) {
  form.addEventListener("change", (event) => { paper.tool = event.target.value; });
  const takeBack = () => {
    if (paper.empty) return;
    paper.undo();
    changed();
  };
  undo.addEventListener("click", takeBack);
  addEventListener("keydown", (event) => {
    const typing = event.target.matches?.("input:not([type=radio])");
    if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key === "z" && !typing) {
      event.preventDefault();
      takeBack();
    }
  });
}
