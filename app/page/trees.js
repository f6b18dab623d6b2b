// ---- a tree --------------------------------------------------------------------------------

let largest; // { H, A } of all trees on the page: one scale, so that steps can be compared

const shadeOfH = (h) => (0.65 * Math.sqrt((h ?? 0) / largest.H)).toFixed(3);

function shadeByA(box, A) {
  box.classList.add(A < 0 ? "minus" : "plus");
  box.style.setProperty("--a", (0.55 * Math.abs((A ?? 0) / largest.A)).toFixed(3));
  return box;
}

function tokens(node, from = 0, to = node.tokens.length) {
  return node.tokens.slice(from, to).map((text, i) => {
    const token = el("span", "t", text);
    if (node.author === "policy" && node.H) {
      token.style.setProperty("--h", shadeOfH(node.H[from + i]));
      token.title = `H ${node.H[from + i]}`;
    }
    return token;
  });
}

function decision(fork) {
  const figure = (key) => el("div", "", el("dt", "", key), el("dd", "", fork[key]));
  const figures = ["H", "H_initial", "gain", "P"].map(figure);
  const state = fork.granted ? "granted" : fork.wanted ? "wanted" : "none";
  return el("div", `decision ${state}`, el("b", "", fork.outcome), el("dl", "", ...figures), el("p", "", fork.rule));
}

function segment(tree, node) {
  const dots = el("span", "dots", ...tree.leaves.map((_, i) => el("i", node.below.includes(i) ? "dot on" : "dot")));
  dots.title = `${node.below.length} of ${tree.leaves.length} trajectories pass through here`;
  const head = el("div", "head", el("span", "", node.head), dots);
  const box = el("div", `seg ${node.author}`, head);
  const cut = node.action ?? node.tokens.length;
  box.append(el("p", "text", ...(node.author === "prompt" ? [tree.question] : tokens(node, 0, cut))));
  if (node.action !== null) box.append(el("p", node.calls ? "text call" : "text answer", ...tokens(node, cut)));
  if (node.author === "policy") {
    dots.before(el("span", "mean", `A ${signed(node.A)}`));
    shadeByA(box, node.A);
  }
  if (node.fork) box.append(decision(node.fork));
  const text = node.author === "prompt" ? tree.question : node.tokens.join("");
  box.setAttribute("aria-label", `${node.head}: ${text}. ${dots.title}. ${node.fork?.story ?? ""}`);
  return box;
}

function leafBox(leaf, i) {
  const lines = [leaf.verdict, `reward ${leaf.reward ?? "–"}`, `A ${signed(leaf.A)}`];
  const text = el("p", "text", leaf.answer ?? "no answer");
  const box = el("div", "leaf", el("div", "head", `trajectory ${i + 1}`), text, ...lines.map((line) => el("p", "", line)));
  box.setAttribute("aria-label", `Leaf, trajectory ${i + 1}: ${text.textContent}, ${lines.join(", ")}`);
  return shadeByA(box, leaf.A);
}

// A branch is a card (a policy segment and the result of its call) and, beside it, what follows.
function draw(tree, choose) {
  const boxes = [], cards = [], kids = [];
  const item = (box, parent, target) => {
    Object.assign(box.dataset, target);
    const level = parent ? Number(parent.ariaLevel) + 1 : 1;
    Object.assign(box, { role: "treeitem", ariaLevel: level, ariaSelected: "false", tabIndex: -1, up: parent });
    box.addEventListener("click", () => choose(box));
    return box;
  };
  tree.nodes.forEach((node, i) => {
    const parent = tree.nodes[node.parent];
    boxes[i] = item(segment(tree, node), boxes[node.parent], { node: i });
    if (node.author === "tool" && parent) {
      [cards[i], kids[i]] = [cards[node.parent], kids[node.parent]];
      cards[i].append(boxes[i]);
      return;
    }
    [cards[i], kids[i]] = [el("div", "card", boxes[i]), el("div", "kids")];
    const branch = el("div", parent?.fork && !node.goes_on ? "branch forked" : "branch", cards[i], kids[i]);
    if (!parent) $("tree").replaceChildren(branch);
    else if (node.goes_on) kids[node.parent].prepend(branch); // straight on; the forks bend off
    else kids[node.parent].append(branch);
  });
  tree.leaves.forEach((leaf, i) => {
    kids[leaf.node].prepend(el("div", "branch end", item(leafBox(leaf, i), boxes[leaf.node], { leaf: i })));
  });
  boxes[0].tabIndex = 0;
}

// ---- what was chosen in it -----------------------------------------------------------------

const meanOf = (tree, node) => node.below.reduce((sum, i) => sum + tree.leaves[i].A, 0) / node.below.length;
const creditOf = (tree, node, i, w) => (1 - w) * tree.leaves[i].A + w * meanOf(tree, node); // advantage.py

function row(node, A, ...side) {
  const trained = node.author === "policy";
  const text = el("div", trained ? "row trained" : "row masked", el("div", "side", ...side.map((s) => el("span", "", s))));
  text.append(el("pre", "", ...tokens(node)));
  return trained ? shadeByA(text, A) : text;
}

function trajectory(tree, i, w) {
  const leaf = tree.leaves[i];
  const path = tree.nodes.filter((node) => node.below.includes(i)); // parents come first
  const count = (nodes) => nodes.reduce((sum, node) => sum + node.tokens.length, 0);
  const trained = count(path.filter((node) => node.author === "policy"));
  const rows = path.map((node) => {
    const A = creditOf(tree, node, i, w);
    const mask = node.author === "policy" ? `mask 1: trained, A ${signed(A)}` : "mask 0: only read";
    return row(node, A, node.author, mask, node.below.length > 1 ? `shared by ${node.below.length}` : "");
  });
  const title = `Trajectory ${i + 1}: ${leaf.answer ?? "no answer"} (${leaf.verdict})`;
  const figures = `Reward ${leaf.reward ?? "–"}, advantage ${signed(leaf.A)}. The loss counts the ${trained} `;
  const mask = `underlined tokens of ${count(path)}: those that the policy wrote.`;
  return [el("h3", "", title), el("p", "note", figures + mask), ...rows];
}

function details(tree, node, w) {
  const on = `${node.tokens.length} tokens, on the way of ${node.below.length} of ${tree.leaves.length} trajectories.`;
  const parts = [el("h3", "", node.head), el("p", "note", on), el("p", "", node.fork?.story ?? ""), row(node, node.A, node.author)];
  if (node.author !== "policy") return parts;
  const rows = node.below.map((i) => [tree.leaves[i].A, meanOf(tree, node), creditOf(tree, node, i, w)]);
  const line = (name, values) => el("tr", "", el("th", "", name), ...values.map((x) => el("td", "", signed(x))));
  const heads = ["A for each token here", "soft: its own", "hard: the mean", `this run: w = ${w}`];
  const caption =
    "What each trajectory adds for these tokens. However it is shared the sum is the same, and so is the " +
    "gradient, until the clip treats + and − differently.";
  const table = el("table", "shares", el("caption", "", caption), el("tr", "", ...heads.map((h) => el("th", "", h))));
  table.append(...rows.map((values, r) => line(`trajectory ${node.below[r] + 1}`, values)));
  table.append(line("sum", [0, 1, 2].map((c) => rows.reduce((sum, values) => sum + values[c], 0))));
  return [...parts, table];
}

// ---- the controls --------------------------------------------------------------------------

function legend() {
  const swatch = (kind, x, text) => {
    const token = el("span", `t ${kind}`, text);
    token.style.setProperty("--h", shadeOfH(x));
    return shadeByA(token, x);
  };
  $("scale").replaceChildren(
    el("span", "H", "entropy H "), ...[0, 0.02, 0.1, 0.4, 1].map((s) => swatch("H", s * largest.H, (s * largest.H).toFixed(3))),
    el("span", "A", "advantage A "), ...[-1, -0.5, 0, 0.5, 1].map((s) => swatch("A", s * largest.A, signed(s * largest.A))),
  );
}

function trees(runs) {
  const state = new URLSearchParams(location.hash.slice(1)); // what is seen can be linked to
  const linked = Object.fromEntries([...state].filter(([key, value]) => /^\d+$/.test(value) || ["fit", "shade"].includes(key)));
  const run = () => runs[$("run").value];
  const steps = () => [...new Set(run().trees.map((t) => t.step))];
  const ofStep = () => run().trees.filter((t) => t.step === steps()[$("step").value]);
  const tree = () => ofStep()[$("question").value];
  const items = () => all("[role=treeitem]", $("tree"));

  function remember(changes) {
    for (const [key, value] of Object.entries(changes)) value === undefined ? state.delete(key) : state.set(key, value);
    history.replaceState(null, "", `#${state}`);
  }
  function focusOn(box) {
    for (const other of items()) other.tabIndex = other === box ? 0 : -1;
    box.focus();
  }
  function close() {
    $("panel").hidden = true;
    for (const box of items()) box.ariaSelected = "false";
    for (const box of items()) box.classList.remove("on-path");
    $("tree").classList.remove("following");
  }
  function choose(box) {
    close();
    const { node, leaf } = box.dataset, w = run().shared_weight;
    $("chosen").replaceChildren(...(leaf ? trajectory(tree(), Number(leaf), w) : details(tree(), tree().nodes[node], w)));
    $("chosen").scrollTop = 0;
    $("panel").hidden = false;
    $("tree").classList.toggle("following", leaf !== undefined);
    for (let on = box; on; on = on.up) on.classList.add("on-path");
    box.ariaSelected = "true";
    focusOn(box);
    remember({ leaf, node });
  }
  function fit() {
    $("tree").style.zoom = 1;
    if ($("fit").checked) $("tree").style.zoom = Math.min(1, $("asked").clientWidth / $("tree").scrollWidth);
    remember({ fit: $("fit").checked || undefined });
  }
  function show() {
    close();
    const { step, domain, question, answers } = tree();
    $("asked").replaceChildren(el("span", "note", `${domain} `), `${question} `);
    $("asked").append(el("span", "note", answers.length ? `Right answer: ${answers.join(" or ")}` : ""));
    draw(tree(), choose);
    remember({ run: $("run").value, step, question: $("question").value, leaf: undefined, node: undefined });
    fit();
  }
  function pickStep() {
    const step = steps()[$("step").value];
    $("at").textContent = step;
    $("step").ariaValueText = `step ${step}`;
    $("question").replaceChildren(...ofStep().map((t, i) => new Option(t.question, i)));
    show();
  }
  function pickRun() {
    const at = steps().indexOf(Number(state.get("step")));
    $("step").max = steps().length - 1;
    $("step").value = Math.max(0, at);
    pickStep();
  }
  function shade() {
    document.body.dataset.shade = all("[name=shade]").find((radio) => radio.checked).value;
    remember({ shade: document.body.dataset.shade });
  }
  function keys(event) {
    const box = event.target, at = items().indexOf(box);
    const child = items().find((other) => other.up === box);
    const to = { ArrowDown: items()[at + 1], ArrowUp: items()[at - 1], ArrowRight: child, ArrowLeft: box.up, Home: items()[0], End: items().at(-1) };
    if (event.key === "Enter" || event.key === " ") choose(box);
    else if (to[event.key]) focusOn(to[event.key]);
    else if (!(event.key in to)) return;
    event.preventDefault();
  }

  $("run").append(...runs.map((r, i) => new Option(r.name, i)).filter((_, i) => runs[i].trees.length));
  $("runs").hidden = $("run").length < 2;
  $("steps").hidden = steps()[0] === null;
  for (const id of ["controls", "keys", "hint"]) $(id).hidden = false;
  const listen = (id, type, act) => $(id).addEventListener(type, act);
  listen("run", "change", pickRun);
  listen("step", "input", pickStep);
  listen("question", "change", show);
  listen("shade", "change", shade);
  listen("fit", "change", fit);
  listen("tree", "keydown", keys);
  listen("close", "click", close);
  addEventListener("resize", fit);
  addEventListener("keydown", (event) => event.key === "Escape" && close());
  const most = (values) => values.reduce((a, b) => Math.max(a, Math.abs(b ?? 0)), 0) || 1;
  const recorded = runs.flatMap((r) => r.trees);
  largest = {
    H: most(recorded.flatMap((t) => t.nodes.flatMap((n) => n.H ?? []))),
    A: most(recorded.flatMap((t) => t.leaves.map((leaf) => leaf.A))),
  };
  legend();
  const shades = all("[name=shade]");
  (shades.find((radio) => radio.value === linked.shade) ?? shades[0]).checked = true;
  $("fit").checked = linked.fit === "true";
  if (runs[linked.run]?.trees.length) $("run").value = linked.run;
  shade();
  pickRun();
  if (ofStep()[linked.question]) $("question").value = linked.question;
  show();
  if ("step" in linked) $("controls").scrollIntoView();
  const chosen = items().find((box) => (linked.leaf ?? linked.node) && box.dataset.leaf === linked.leaf && box.dataset.node === linked.node);
  if (chosen) choose(chosen);
}
