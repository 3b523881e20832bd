"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const find = (selector, inside = document) => inside.querySelector(selector);
  const TERMS = ["raw", "artifact", "residual"]; // that have no strength
  const LOW = -0.5; // cosines below are as dark as this one

  find("#theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  const bytes = (text) => Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
  const photos = new Map(data.images.map((each) => [each.number, `data:image/jpeg;base64,${each.jpeg}`]));
  for (const img of document.querySelectorAll("img[data-photo]")) img.src = photos.get(Number(img.dataset.photo));
  if (!data.images.length) return;

  const colours = bytes(data.colours);
  const layerName = (layer) => (layer === -1 ? "final" : `block ${layer}`);
  const state = {
    image: data.images[0],
    backbone: data.backbones[0],
    held: { x: 0.5, y: 0.5 }, // of the image, so that it stays when the grid changes
    hover: null,
  };

  // ---- features

  function entry(variant, layer) {
    return data.maps.find((each) => each.image === state.image.number && each.backbone === state.backbone.label
      && each.variant === variant && each.layer === layer);
  }

  function layersOf(variant) {
    const found = data.maps.filter((each) => each.image === state.image.number
      && each.backbone === state.backbone.label && each.variant === variant).map((each) => each.layer);
    return found.sort((a, b) => (a === -1) - (b === -1) || a - b);
  }

  function numbers(map) {
    map.decoded ??= new Int8Array(bytes(map.values).buffer);
    return map.decoded;
  }

  // The rows and columns of patches that a picture shows from pixel to pixel: where patches overlap, a pixel shows the
  // patch whose centre is nearest.
  function cellsOf([height, width]) {
    const plain = (length) => Array.from({ length }, (_, i) => i);
    const [rows, columns] = state.backbone.cells[`${height}x${width}`] ?? [plain(height), plain(width)];
    return { rows, columns };
  }

  // Raw and the variant mixed by strength, every token of length 1 (or 0 if it is nothing).
  function features(panel) {
    const map = entry(panel.variant, panel.layer);
    const raw = panel.mixes ? entry("raw", panel.layer) : map;
    const [height, width, count] = map.shape;
    const own = panel.mixes ? panel.strength * map.scale : map.scale;
    const rest = panel.mixes ? (1 - panel.strength) * raw.scale : 0;
    const [a, b] = [numbers(map), numbers(raw)];
    const tokens = new Float32Array(a.length);
    for (let start = 0; start < tokens.length; start += count) {
      let square = 0;
      for (let i = start; i < start + count; i++) {
        tokens[i] = own * a[i] + rest * b[i];
        square += tokens[i] * tokens[i];
      }
      const norm = Math.sqrt(square) || 1;
      for (let i = start; i < start + count; i++) tokens[i] /= norm;
    }
    return { height, width, count, tokens, ...cellsOf(map.shape) };
  }

  function patchOf(point, grid) {
    const shown = (cells, place) => cells[Math.min(cells.length - 1, Math.max(0, Math.floor(place * cells.length)))];
    return { row: shown(grid.rows, point.y), column: shown(grid.columns, point.x) };
  }

  // Where the cell of a patch begins and ends, as shares of the picture's side.
  const span = (cells, patch) => [cells.indexOf(patch) / cells.length, (cells.lastIndexOf(patch) + 1) / cells.length];

  function similarity(grid, patch) {
    const { tokens, count } = grid;
    const from = (patch.row * grid.width + patch.column) * count;
    const found = new Float32Array(grid.height * grid.width);
    for (let i = 0; i < found.length; i++) {
      let sum = 0;
      for (let j = 0; j < count; j++) sum += tokens[i * count + j] * tokens[from + j];
      found[i] = sum;
    }
    return found;
  }

  // ---- drawing

  function paint(canvas, values, { width, rows, columns }) {
    const size = { width: columns.length, height: rows.length };
    if (canvas.width !== size.width || canvas.height !== size.height) Object.assign(canvas, size);
    const context = canvas.getContext("2d");
    const picture = context.createImageData(size.width, size.height);
    let i = 0;
    for (const row of rows) {
      for (const column of columns) {
        const value = values[row * width + column];
        const place = 3 * Math.round(255 * Math.min(1, Math.max(0, (value - LOW) / (1 - LOW))));
        for (let k = 0; k < 3; k++) picture.data[i++] = colours[place + k];
        picture.data[i++] = 255;
      }
    }
    context.putImageData(picture, 0, 0);
  }

  function frame(stage, patch, grid) {
    const [[left, right], [top, bottom]] = [span(grid.columns, patch.column), span(grid.rows, patch.row)];
    Object.assign(find(".frame", stage).style, {
      left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * (right - left)}%`, height: `${100 * (bottom - top)}%`,
    });
  }

  function draw() {
    const point = state.hover ?? state.held;
    const words = [];
    for (const panel of panels) {
      panel.features ??= features(panel);
      const patch = patchOf(point, panel.features);
      panel.values = similarity(panel.features, patch);
      paint(panel.canvas, panel.values, panel.features);
      frame(panel.stage, patch, panel.features);
      const alike = Math.round((100 * panel.values.filter((value) => value > 0.5).length) / panel.values.length);
      panel.spread.textContent = `${alike}\u202f% of patches above 0.5`;
      panel.canvas.setAttribute("aria-label", `Cosine similarity to row ${patch.row + 1}, column ${patch.column + 1}, `
        + `${panel.title()}: ${alike} percent of patches above 0.5`);
      words.push(`${panel.title()}: ${alike} percent of patches above 0.5`);
    }
    const grid = panels[0].features;
    const patch = patchOf(point, grid);
    frame(photo, patch, grid);
    find("#patch").textContent = `row ${patch.row + 1} of ${grid.height}, column ${patch.column + 1} of ${grid.width}`;
    if (!state.hover) find("#spoken").textContent = `${find("#patch").textContent}. ${words.join(". ")}.`;
  }

  // ---- two maps

  class Panel {
    constructor(id, strength) {
      const figure = find(`#${id}`);
      Object.assign(this, { figure, strength, stage: find(".stage", figure), canvas: find("canvas", figure) });
      Object.assign(this, { spread: find(".spread", figure), select: find("select", figure) });
      this.sliders = { layer: find(".layer input", figure), strength: find(".strength input", figure) };
      this.select.addEventListener("change", () => this.show(this.select.value));
      this.sliders.layer.addEventListener("input", () => {
        this.show(this.variant, layersOf(this.variant)[this.sliders.layer.value]);
      });
      this.sliders.strength.addEventListener("input", () => {
        this.strength = this.sliders.strength.value / 100;
        this.show(this.variant, this.layer);
      });
    }

    offer(variants, wanted) {
      this.select.replaceChildren(...variants.map((name) => new Option(data.labels[name], name)));
      this.show(variants.includes(wanted) ? wanted : variants[0], this.layer);
    }

    show(variant, layer) {
      const layers = layersOf(variant);
      this.variant = this.select.value = variant;
      this.layer = [layer, state.backbone.layer, layers[0]].find((each) => layers.includes(each));
      const [own, raw] = [entry(variant, this.layer), entry("raw", this.layer)];
      this.mixes = !TERMS.includes(variant) && Boolean(raw) && String(raw.shape) === String(own.shape);
      this.features = null;
      this.label("layer", layers.length > 1, layers.indexOf(this.layer), layerName(this.layer));
      this.sliders.layer.max = Math.max(0, layers.length - 1);
      this.sliders.layer.value = layers.indexOf(this.layer);
      this.label("strength", this.mixes, Math.round(100 * this.strength),
        this.mixes ? `${Math.round(100 * this.strength)}\u202f%` : "\u2013");
      draw.ready && draw();
    }

    label(name, on, value, text) {
      const slider = this.sliders[name];
      slider.disabled = !on;
      slider.value = value;
      slider.setAttribute("aria-valuetext", text);
      slider.parentElement.classList.toggle("off", !on);
      find("b", slider.parentElement).textContent = text;
    }

    title() {
      const strength = this.mixes && this.strength < 1 ? ` at strength ${Math.round(100 * this.strength)} percent` : "";
      return `${data.labels[this.variant]}${strength}, ${layerName(this.layer)}`;
    }
  }

  const photo = find("#photo .stage");
  const panels = [new Panel("left", 1), new Panel("right", 1)];

  // ---- choosing

  function choose(image, backbone) {
    Object.assign(state, { image, backbone, hover: null });
    const [width, height] = image.size;
    find("img", photo).src = photos.get(image.number);
    find("img", photo).alt = image.name;
    find("#photo-name").textContent = image.name;
    for (const stage of [photo, ...panels.map((panel) => panel.stage)]) {
      stage.style.aspectRatio = `${width} / ${height}`;
      stage.style.setProperty("--ratio", width / height);
    }
    const variants = backbone.variants.filter((name) => layersOf(name).length);
    const layers = new Set(variants.flatMap(layersOf));
    for (const panel of panels) {
      panel.sliders.layer.parentElement.hidden = layers.size < 2;
      panel.sliders.strength.parentElement.hidden = variants.every((name) => TERMS.includes(name));
    }
    draw.ready = false;
    panels[0].offer(variants, panels[0].variant ?? "raw");
    const clean = variants.find((name) => name !== "raw") ?? variants[0];
    panels[1].offer(variants, variants.includes(panels[1].variant) ? panels[1].variant : clean);
    draw.ready = true;
    draw();
  }

  function pointOf(event) {
    const box = event.currentTarget.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  }

  for (const stage of [photo, ...panels.map((panel) => panel.stage)]) {
    stage.addEventListener("pointermove", (event) => {
      state.hover = pointOf(event);
      if (event.pointerType === "touch") Object.assign(state, { held: state.hover, hover: null });
      draw();
    });
    stage.addEventListener("pointerleave", () => {
      state.hover = null;
      draw();
    });
    stage.addEventListener("click", (event) => {
      Object.assign(state, { held: pointOf(event), hover: null });
      draw();
    });
  }

  photo.addEventListener("keydown", (event) => {
    const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if ((!x && !y) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const grid = panels[0].features;
    const { row, column } = patchOf(state.held, grid);
    const to = [Math.min(grid.width - 1, Math.max(0, column + x)), Math.min(grid.height - 1, Math.max(0, row + y))];
    const middle = (cells, patch) => span(cells, patch).reduce((a, b) => a + b) / 2;
    Object.assign(state, { held: { x: middle(grid.columns, to[0]), y: middle(grid.rows, to[1]) }, hover: null });
    draw();
  });

  const images = find("#images");
  data.images.forEach((image, i) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "image", value: i, checked: !i });
    const img = Object.assign(document.createElement("img"), { src: photos.get(image.number), alt: image.name });
    label.title = image.name;
    input.addEventListener("change", () => choose(image, state.backbone));
    label.append(input, img);
    images.append(label);
  });

  const backbones = find("#backbone");
  backbones.replaceChildren(...data.backbones.map((each, i) => new Option(each.label, i)));
  backbones.addEventListener("change", () => choose(state.image, data.backbones[backbones.value]));
  find("#backbone-choice").hidden = data.backbones.length < 2;

  const scale = Float32Array.from({ length: 256 }, (_, i) => LOW + ((1 - LOW) * i) / 255);
  paint(find("#scale"), scale, { width: 256, rows: [0], columns: [...scale.keys()] });
  choose(state.image, state.backbone);

  // For tests and consoles: what is shown now.
  window.dvtReport = {
    panels: () => panels.map(({ variant, layer, strength, mixes, values, features: { height, width } }) => (
      { variant, layer, strength: mixes ? strength : 1, values: Array.from(values), height, width })),
    patch: () => patchOf(state.hover ?? state.held, panels[0].features),
  };
})();
