// The drawing area: black on white, for a mouse, a pen or a finger. The area inside a closed stroke is
// filled with a lighter colour than the lines, so that a collar or a seam on it stays visible.

export const TOOLS = {
  fine: { width: 14, color: "#000" },
  broad: { width: 48, color: "#000" },
  eraser: { width: 36, color: "#fff" },
};
const FILLING = "#464646";
const CELL = 4; // pixels; enclosed areas are found on a grid with cells of this size
const HALF_GAP = 2; // cells; gaps up to twice this width count as closed
const NEAR = 60; // pixels; a long stroke that ends this near its beginning is closed

/** Turns a square canvas into a drawing area; calls `changed` after every stroke and its parts. */
export function makePaper(canvas, changed) {
  const side = canvas.width / CELL;
  const wide = side + 2 * (HALF_GAP + 1); // with a rim, so that the outside is one connected area
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const small = Object.assign(document.createElement("canvas"), { width: side, height: side })
    .getContext("2d", { willReadFrequently: true });
  let strokes = [];
  let stroke = null; // the current stroke
  let before; // the enclosed cells when it began
  pen.lineCap = pen.lineJoin = "round";

  function line({ tool, points }, from = 0) { // in pieces, as it is drawn
    pen.strokeStyle = tool.color;
    pen.lineWidth = tool.width;
    for (let i = from; i < points.length; i += 1) {
      const [x, y] = points[i];
      pen.beginPath();
      pen.moveTo(...points[Math.max(0, i - 1)]);
      pen.lineTo(x, y + 0.01); // so that a click leaves a dot
      pen.stroke();
    }
  }

  function fill({ cells }) {
    pen.fillStyle = FILLING;
    pen.globalCompositeOperation = "darken"; // lines stay black
    for (const i of cells) {
      const x = (i % wide) - HALF_GAP - 1, y = Math.floor(i / wide) - HALF_GAP - 1;
      pen.fillRect((x - 1) * CELL, (y - 1) * CELL, 3 * CELL, 3 * CELL); // up to the middle of the line
    }
    pen.globalCompositeOperation = "source-over";
  }

  function repaint() {
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    for (const drawn of strokes) {
      line(drawn);
      fill(drawn);
    }
  }

  /** Returns for each cell whether it is enclosed by lines, with small gaps closed. */
  function enclosed() {
    small.drawImage(canvas, 0, 0, side, side);
    const { data } = small.getImageData(0, 0, side, side);
    const ink = new Uint8Array(wide * wide);
    for (let i = 0; i < side * side; i += 1) {
      const at = (Math.floor(i / side) + HALF_GAP + 1) * wide + (i % side) + HALF_GAP + 1;
      ink[at] = data[4 * i] < 200;
    }
    const grow = (cells) => { // by one cell in all eight directions
      const rows = cells.map((c, i) => c | cells[i - 1] | cells[i + 1]);
      return rows.map((c, i) => c | rows[i - wide] | rows[i + wide]);
    };
    let walls = ink;
    for (let i = 0; i < HALF_GAP; i += 1) walls = grow(walls);
    const outside = new Uint8Array(wide * wide);
    const open = [0];
    while (open.length) {
      const at = open.pop();
      if (outside[at] !== 0 || walls[at] !== 0) continue; // undefined beyond the rim
      outside[at] = 1;
      open.push(at - 1, at + 1, at - wide, at + wide);
    }
    let inside = walls.map((c, i) => !c && !outside[i]); // narrow gaps between lines are not inside
    for (let i = 0; i <= HALF_GAP; i += 1) inside = grow(inside); // one more for the corners
    return inside.map((c, i) => c && !ink[i]);
  }

  function move(event) {
    const { left, top, width } = canvas.getBoundingClientRect();
    const scale = canvas.width / width;
    stroke.points.push([(event.clientX - left) * scale, (event.clientY - top) * scale]);
    line(stroke, stroke.points.length - 1);
  }

  function end(event) {
    if (event.pointerId !== stroke?.pointer) return;
    const { points, tool } = stroke;
    if (tool !== TOOLS.eraser) {
      const steps = points.slice(1).map(([x, y], i) => Math.hypot(x - points[i][0], y - points[i][1]));
      const gap = Math.hypot(points.at(-1)[0] - points[0][0], points.at(-1)[1] - points[0][1]);
      if (gap < NEAR && steps.reduce((a, b) => a + b, 0) > 4 * NEAR) {
        points.push(points[0]);
        line(stroke, points.length - 1);
      }
      // Fill only newly enclosed cells: the eraser may have made holes in the others.
      enclosed().forEach((now, i) => { if (now && !before[i]) stroke.cells.push(i); });
      fill(stroke);
    }
    stroke = null;
    changed();
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button || stroke) return; // only one finger draws
    canvas.setPointerCapture(event.pointerId);
    before = enclosed();
    stroke = { pointer: event.pointerId, tool: TOOLS[paper.tool()], points: [], cells: [] };
    strokes.push(stroke);
    move(event);
    changed();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.pointerId !== stroke?.pointer) return;
    const between = event.getCoalescedEvents?.() ?? []; // browsers have it only at secure addresses
    for (const moved of between.length ? between : [event]) move(moved);
    changed();
  });
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, end);

  const paper = {
    canvas,
    tool: () => "fine",
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

/** Connects the tools: radio buttons named `tool`, and a button that undoes the last stroke. */
export function bindTools(form, undo, paper, changed) {
  paper.tool = () => form.elements.tool.value; // browsers may restore it without an event
  const undoStroke = () => {
    if (paper.empty) return;
    paper.undo();
    changed();
  };
  undo.addEventListener("click", undoStroke);
  addEventListener("keydown", (event) => {
    const typing = event.target.matches?.("input:not([type=radio])");
    if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key === "z" && !typing) {
      event.preventDefault();
      undoStroke();
    }
  });
}
