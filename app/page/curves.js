// ---- curves: pointing at a step in one shows its values in all ------------------------------

const LEFT = 46, RIGHT = 424, WIDTH = 440; // of a plot, as in curves.py

function curves({ steps, charts, formats }, names) {
  const span = steps.at(-1) - steps[0] || 1;
  const value = (x, [, digits, kind]) =>
    x === null ? "–" : kind === "%" ? (100 * x).toFixed(digits) + " %" : x.toFixed(digits);

  function pointAt(n) {
    for (const plot of all(".plot")) {
      const i = plot.dataset.chart;
      const x = LEFT + ((RIGHT - LEFT) * (steps[n] - steps[0])) / span;
      $("cross" + i).setAttribute("transform", `translate(${x})`);
      $("cross" + i).setAttribute("visibility", "visible");
      const values = charts[i].map((line) => {
        const run = el("span", "unseen", names.length > 1 ? `${names[line.run]} ` : "");
        return el("span", `run${line.run}`, run, `${line.name} ${value(line.values[n], formats[i])}`);
      });
      $("readout" + i).replaceChildren(`step ${steps[n]}`, ...values);
    }
  }

  for (const plot of all(".plot")) {
    let at = steps.length - 1;
    const readout = $("readout" + plot.dataset.chart);
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * WIDTH;
      const step = steps[0] + ((x - LEFT) / (RIGHT - LEFT)) * span;
      const closer = (best, s, n) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? n : best);
      pointAt((at = steps.reduce(closer, 0)));
    });
    plot.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
      if (!(event.key in moves)) return;
      event.preventDefault();
      readout.setAttribute("aria-live", "polite"); // this one is read out, the others are not
      pointAt((at = Math.min(steps.length - 1, Math.max(0, at + moves[event.key]))));
    });
    plot.addEventListener("blur", () => readout.setAttribute("aria-live", "off"));
  }
  pointAt(steps.length - 1);
}
