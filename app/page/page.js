"use strict";
// Readouts under the curves, and the rollout trees. What was recorded is only ever set as text.

const $ = (id) => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const signed = (x) => (x === null ? "–" : (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(2));

function el(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children); // a string becomes a text node
  return element;
}

// Compressed JSON in base64: nothing that was recorded stands in the page as markup.
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const json = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(json).text());
}

addEventListener("DOMContentLoaded", async () => {
  const data = await unpack($("data").textContent);
  if (data.curves.steps.length) curves(data.curves, data.runs.map((run) => run.name));
  if (data.runs.some((run) => run.trees.length)) trees(data.runs);
  else $("tree").replaceChildren(el("p", "note", "No tree has been recorded."));
  addEventListener("beforeprint", () => all("details:not(.steps)").forEach((part) => (part.open = true)));
  document.documentElement.dataset.ready = "yes";
});
