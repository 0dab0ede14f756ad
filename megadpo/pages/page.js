"use strict";
// What is under the pointer, of every chart: charts.py has written its values into the attribute data-chart.
(() => {
  const words = (value) => (typeof value === "number" ? String(Number(value.toPrecision(5))) : String(value));

  // From a value to a place, and back; an axis is [low, high, start, end, isLog].
  const scaled = (value, isLog) => (isLog ? Math.log10(value) : value);
  const place = (value, [low, high, start, end, isLog]) =>
    start + ((scaled(value, isLog) - scaled(low, isLog)) / (scaled(high, isLog) - scaled(low, isLog))) * (end - start);
  const valueAt = (at, [low, high, start, end]) => low + ((at - start) / (end - start)) * (high - low);

  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  };

  // {x, heading, lines: [[colour, text]]} at a value of the x axis.
  const linesAt = (chart, x) => {
    const withPoints = chart.series.filter((one) => one.x.length);
    const xs = withPoints.map((one) => one.x[nearest(one.x, x)]);
    const best = xs.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
    const lines = [];
    for (const one of withPoints) {
      const at = nearest(one.x, best);
      if (one.y[at] !== null && one.x[at] === best) lines.push([one.colour, `${one.name}: ${words(one.y[at])}`]);
    }
    return { x: best, heading: `${chart.xLabel} ${words(best)}`, lines };
  };
  const binAt = (chart, x) => {
    const width = chart.edges[1] - chart.edges[0];
    const bin = Math.min(Math.max(Math.floor((x - chart.edges[0]) / width), 0), chart.edges.length - 2);
    const [from, to] = [chart.edges[bin], chart.edges[bin + 1]];
    const lines = chart.series.map((one) => [one.colour, `${one.name}: ${one.y[bin]}`]);
    return { x: (from + to) / 2, heading: `${chart.xLabel} ${words(from)} to ${words(to)}`, lines };
  };

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = JSON.parse(svg.dataset.chart);
    const pointer = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const tip = document.createElement("div");
    tip.className = "tip";
    pointer.setAttribute("class", "pointer");
    pointer.setAttribute("y1", chart.y[3]);
    pointer.setAttribute("y2", chart.y[2]);
    const hide = () => { pointer.remove(); tip.remove(); };
    const show = (event) => {
      const box = svg.getBoundingClientRect();
      const scale = box.width / svg.viewBox.baseVal.width;
      const x = valueAt((event.clientX - box.left) / scale, chart.x);
      const found = chart.kind === "bins" ? binAt(chart, x) : linesAt(chart, x);
      const at = place(found.x, chart.x);
      pointer.setAttribute("x1", at);
      pointer.setAttribute("x2", at);
      svg.append(pointer);
      tip.replaceChildren(found.heading);
      for (const [colour, text] of found.lines) {
        const line = document.createElement("span");
        line.className = `key c${colour}`;
        line.textContent = text;
        tip.append(line);
      }
      svg.parentElement.append(tip);
      const left = box.left - svg.parentElement.getBoundingClientRect().left + at * scale;
      const isRight = at > (chart.x[2] + chart.x[3]) / 2;
      tip.style.left = isRight ? "auto" : `${left + 10}px`;
      tip.style.right = isRight ? `${svg.parentElement.clientWidth - left + 10}px` : "auto";
      tip.style.top = `${svg.parentElement.clientHeight - box.height}px`;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", hide);
  }
})();
