// Keys for what the page can do anyway with a mouse or Tab: every key is the `aria-keyshortcuts` of an element.
"use strict";

const shortcuts = document.getElementById("shortcuts");
const form = document.getElementById("mark");
const parts = form?.dataset.scale ? [...form.querySelectorAll("fieldset")] : [];
const note = form?.querySelector("[name=note]");
let marking = false; // the note goes with the mark
let sent = false; // one mark a page: a second press while the next row loads must not mark twice

const targets = new Map();
for (const element of document.querySelectorAll("[aria-keyshortcuts]"))
  for (const key of element.getAttribute("aria-keyshortcuts").split(" ")) targets.set(key, element);

function remembered(box, name) {
  if (!box) return;
  const kept = localStorage.getItem(name);
  if (kept !== null) box.checked = kept === "on";
  box.addEventListener("change", () => localStorage.setItem(name, box.checked ? "on" : "off"));
}
remembered(shortcuts, "rlaif-review-shortcuts");
remembered(document.querySelector("[name=stay]"), "rlaif-review-stay");

const given = (part) => part.querySelector("input:checked");
const typing = (element) => element.matches("textarea, select, input:not([type=radio], [type=checkbox])");

function frame() {
  const waiting = parts.find((part) => !given(part));
  for (const part of parts) part.closest("article").classList.toggle("current", part === waiting);
  return waiting;
}

// A digit answers for the response with the keyboard's focus, or else for the first without an answer.
function answer(digit) {
  const part = document.activeElement.closest("fieldset") ?? frame() ?? parts.at(-1);
  const choice = part?.querySelector(`input[value="${digit}"]`);
  if (!choice) return false;
  choice.checked = true;
  document.activeElement.blur();
  frame()?.closest("article").scrollIntoView({ block: "nearest" });
  return true;
}

function clear() {
  const last = parts.filter(given).at(-1);
  if (last) given(last).checked = false;
  frame();
}

function step(by) {
  const rows = [...document.querySelectorAll(".rows a")];
  const at = rows.indexOf(document.activeElement);
  rows[Math.min(rows.length - 1, Math.max(0, at < 0 ? 0 : at + by))]?.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || document.querySelector("dialog[open]")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (typing(event.target)) {
    if (key === "Escape") event.target.blur();
    if (key === "Enter" && event.target === note && !event.shiftKey) {
      note.blur(); // the next key is a mark, which takes the note along
      event.preventDefault();
    }
    return;
  }
  if (shortcuts && !shortcuts.checked && key !== "?") return;
  if (event.target.matches("input[type=radio]") && key.startsWith("Arrow")) return;
  const target = targets.get(key);
  if (parts.length && /^[1-9]$/.test(key)) {
    if (!answer(key)) return;
  } else if (parts.length && key === "Backspace") clear();
  else if (key === "Enter" && event.target.matches("a, button, summary")) return;
  else if (!target && (key === "j" || key === "k")) step(key === "j" ? 1 : -1);
  else if (!target) return;
  else if (typing(target)) target.focus();
  else target.click();
  event.preventDefault();
});

document.addEventListener("submit", (event) => {
  if (event.target.method !== "post") return;
  if (sent) event.preventDefault();
  sent = true;
  marking = event.target === form;
});
addEventListener("pageshow", () => (sent = marking = false));
// A note is kept with a mark alone: whoever leaves without one is asked.
addEventListener("beforeunload", (event) => {
  if (note && !marking && note.value !== note.defaultValue) event.preventDefault();
});
document.addEventListener("change", (event) => {
  if (event.target.matches(".filters select")) event.target.form.requestSubmit();
  if (event.target.matches(".scale input")) frame();
});
for (const button of document.querySelectorAll("[data-dialog]"))
  button.addEventListener("click", () => document.getElementById(button.dataset.dialog).showModal());
const turns = document.querySelector(".scroll");
if (turns?.children.length > 1) turns.scrollTop = turns.lastElementChild.offsetTop - turns.offsetTop; // what is answered
frame();
