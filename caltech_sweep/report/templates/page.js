"use strict";
// The page is complete without this script; it only lets the reader choose other rows and groupings.
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const listen = (element, event, action) => { element.addEventListener(event, action); };

// A select shows one of the items that belong to it.
for (const select of all("select[data-switch]")) {
  const show = () => {
    for (const item of all(`[data-for="${select.dataset.switch}"]`)) {
      item.toggleAttribute("hidden", item.dataset.item !== select.value);
    }
  };
  listen(select, "change", show);
  show(); // browsers keep a choice over a reload
}

// The grouping of curves: another style for each line, another legend.
for (const box of all(".curves")) {
  const group = () => {
    const chosen = all("input:checked", box)[0]?.value;
    if (!chosen) return;
    for (const line of all(".charts .series", box)) line.setAttribute("class", `series ${line.getAttribute(`data-${chosen}`)}`);
    for (const legend of all(".legend", box)) legend.hidden = legend.dataset.by !== chosen;
  };
  for (const input of all("input", box)) listen(input, "change", group);
  group();
}

// What a cell of a confusion matrix stands for.
for (const figure of all("[data-matrix]")) {
  const { classes, cells } = data.matrices[figure.dataset.matrix];
  const svg = figure.querySelector("svg");
  const output = figure.querySelector("output");
  const select = figure.querySelector("select");
  listen(svg, "pointermove", (event) => {
    const scale = svg.viewBox.baseVal.width / svg.getBoundingClientRect().width;
    const place = (position, start) => Math.floor(((position - start) * scale - svg.dataset.margin) / svg.dataset.cell);
    const bounds = svg.getBoundingClientRect();
    const column = place(event.clientX, bounds.left);
    const row = place(event.clientY, bounds.top);
    if (!(classes[row] && classes[column])) return;
    const found = cells[select ? select.value : 0].find(([t, p]) => t === row && p === column);
    output.textContent = `${classes[row]} taken for ${classes[column]}: ${found ? found[2] : 0}`;
  });
}

// Two rows, class by class. The rows of the table are there already; they get other figures and another order.
const comparison = document.getElementById("comparison");
if (comparison) {
  const [first, second] = all("select", comparison);
  const body = comparison.querySelector("tbody");
  const compare = () => {
    const [a, b] = [data.rows[first.value], data.rows[second.value]];
    const changes = all("tr", body).map((row) => {
      const i = Number(row.dataset.class);
      const shared = a.total[i] > 0 && b.total[i] > 0;
      row.hidden = !shared;
      const [one, two] = [a.right[i] / a.total[i], b.right[i] / b.total[i]];
      return { row, i, shared, difference: shared ? two - one : 9, texts: [a, b].map((r) => `${r.right[i]} of ${r.total[i]}`) };
    });
    changes.sort((x, y) => Math.round((x.difference - y.difference) * 1e9) || x.i - y.i);
    for (const { row, shared, difference, texts } of changes) {
      body.append(row);
      if (!shared) continue;
      row.cells[2].textContent = texts[0];
      row.cells[3].textContent = texts[1];
      const sign = difference > 0 ? "+" : difference < 0 ? "\u2212" : "";
      row.querySelector(".figure").textContent = sign + Math.abs(difference).toFixed(2);
      row.querySelector(".bar").style.setProperty("--d", difference);
      row.querySelector(".bar").className = difference < 0 ? "bar worse" : "bar";
    }
    const count = (test) => changes.filter((change) => change.shared && test(change.difference)).length;
    comparison.querySelector("[data-worse]").textContent = count((d) => d < -1e-9);
    comparison.querySelector("[data-better]").textContent = count((d) => d > 1e-9);
    comparison.querySelector("[data-same]").textContent = count((d) => Math.abs(d) <= 1e-9);
    all("thead th", comparison).slice(2, 4).forEach((cell, n) => {
      const [study, other] = [first, second].map((select) => select.selectedOptions[0].parentElement.label);
      const option = [first, second][n].selectedOptions[0];
      cell.textContent = study === other ? option.textContent : `${option.parentElement.label}: ${option.textContent}`;
    });
  };
  for (const select of [first, second]) listen(select, "change", compare);
  listen(comparison.querySelector("button"), "click", () => {
    [first.value, second.value] = [second.value, first.value];
    compare();
  });
  compare();
}
