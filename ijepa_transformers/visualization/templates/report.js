"use strict";
// Click a patch: the more similar another patch is to it (cosine of the features), the brighter it stays. A patch that is
// no more similar than the median is darkest, and still visible; the most similar other patch is fully bright.
(() => {
  const holder = document.getElementById("patches");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const browser = document.getElementById("browser");
  const tiles = [...browser.querySelectorAll(".tile")].filter((tile) => tile.offsetParent !== null); // fewer on a phone
  const placeless = document.getElementById("placeless");
  const summary = document.getElementById("summary");
  const darkest = 0.6; // share of black over a patch
  const numPatches = data.rows * data.columns;
  const bytes = (text) => new Int8Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
  const kinds = [bytes(data.features), bytes(data.placeless)];
  let chosen = { image: data.image, patch: data.patch };

  const vectorAt = (features, image, patch) => {
    const start = (image * numPatches + patch) * data.size;
    return features.subarray(start, start + data.size);
  };
  const dot = (one, other) => one.reduce((sum, value, place) => sum + value * other[place], 0);

  const outline = (context, patch, width, height, color) => {
    const column = patch % data.columns, row = Math.floor(patch / data.columns);
    context.strokeStyle = color;
    context.lineWidth = 3;
    context.strokeRect(column * width + 1.5, row * height + 1.5, width - 3, height - 3);
  };

  // Cosines of the chosen patch with all patches, one array for each image.
  const similarities = (features) => {
    const query = vectorAt(features, chosen.image, chosen.patch);
    const length = Math.sqrt(dot(query, query)) || 1;
    return tiles.map((tile, image) => Float32Array.from({ length: numPatches }, (_, patch) => {
      const other = vectorAt(features, image, patch);
      return dot(query, other) / (length * (Math.sqrt(dot(other, other)) || 1));
    }));
  };

  const draw = () => {
    const cosines = similarities(kinds[placeless.checked ? 1 : 0]);
    const isQuery = (image, patch) => image === chosen.image && patch === chosen.patch;
    const others = cosines.flatMap((values, image) => [...values].filter((_, patch) => !isQuery(image, patch)));
    others.sort((one, other) => one - other);
    const usual = others[Math.floor(others.length / 2)], most = others[others.length - 1];
    const written = (value) => (Math.round(100 * value) / 100 + 0).toFixed(2);  // not -0.00
    summary.textContent = `The most similar patch has similarity ${written(most)}, a usual one ${written(usual)}.`;
    tiles.forEach((tile, image) => {
      const canvas = tile.querySelector("canvas");
      const picture = tile.querySelector("img");
      canvas.width = 2 * picture.width;
      canvas.height = 2 * picture.height;
      const width = canvas.width / data.columns, height = canvas.height / data.rows;
      const context = canvas.getContext("2d");
      let best = -2, bestPatch = 0;
      for (let patch = 0; patch < numPatches; patch++) {
        const cosine = cosines[image][patch];
        if (cosine > best && !isQuery(image, patch)) [best, bestPatch] = [cosine, patch];
        const share = Math.min(1, Math.max(0, (cosine - usual) / (most - usual || 1)));
        context.fillStyle = `rgba(8, 8, 20, ${darkest * (1 - share)})`;
        const column = patch % data.columns, row = Math.floor(patch / data.columns);
        const left = Math.round(column * width), top = Math.round(row * height);  // no gaps and no overlaps
        context.fillRect(left, top, Math.round((column + 1) * width) - left, Math.round((row + 1) * height) - top);
      }
      outline(context, bestPatch, width, height, "#ffb000");
      if (image === chosen.image) outline(context, chosen.patch, width, height, "#ff2a8d");
    });
  };

  const choose = (image, event) => {
    const box = tiles[image].getBoundingClientRect();
    const place = (offset, side, count) => Math.min(count - 1, Math.max(0, Math.floor((offset / side) * count)));
    const column = place(event.clientX - box.left, box.width, data.columns);
    const row = place(event.clientY - box.top, box.height, data.rows);
    chosen = { image, patch: row * data.columns + column };
    draw();
  };
  tiles.forEach((tile, image) => {
    tile.addEventListener("pointerdown", (event) => choose(image, event));
    tile.addEventListener("pointermove", (event) => { if (event.buttons) choose(image, event); });
  });
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  browser.addEventListener("keydown", (event) => {
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const row = Math.floor(chosen.patch / data.columns) + step[0], column = (chosen.patch % data.columns) + step[1];
    if (row < 0 || column < 0 || row >= data.rows || column >= data.columns) return;
    chosen.patch = row * data.columns + column;
    draw();
  });
  placeless.addEventListener("change", draw);
  draw();
})();
