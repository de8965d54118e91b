// Dialogs of the pages. The browser keeps the focus inside, closes them with Escape, and gives the focus back.

import { h } from "./dom.js";

// Opens a dialog with a heading; `onClose(returnValue)` is called when it is closed. Gives the element.
export function open(title, children, onClose) {
  const before = document.activeElement;
  const heading = h("h2", { id: `dialog-${++count}` }, title);
  const element = h("dialog", { "aria-labelledby": heading.id }, heading, children);
  document.body.append(element);
  element.addEventListener("close", () => {
    element.remove();
    if (before?.isConnected) before.focus();
    onClose?.(element.returnValue);
  });
  element.showModal();
  return element;
}

let count = 0;

// What closes a dialog that has nothing to decide.
export const closing = () => h("form", { method: "dialog" }, h("button", { autofocus: true }, "Close"));

// Says that something was refused, and why.
export const refuse = (why) => open("That cannot be done", [h("p", { class: "problem" }, why), closing()]);

// Asks whether to do something, with the consequences in words and, with `fields`, for more.
// `action(form)` is called with the form's values and does it; what it throws is shown in the dialog, which stays open.
// Resolves to what `action` gave, or to null if the person did not want it.
export function confirm({ title, says, fields = [], verb, danger = false, action }) {
  return new Promise((resolve) => {
    let result = null;
    const problem = h("p", { class: "problem", role: "alert" });
    const yes = h("button", { type: "submit", class: danger ? "danger" : "primary", value: "yes" }, verb);
    const no = h("button", { type: "button", onclick: () => element.close() }, "Cancel");
    const form = h(
      "form",
      { method: "dialog", class: "confirm" },
      says.map((line) => h("p", {}, line)),
      fields,
      problem,
      h("div", { class: "buttons" }, yes, no),
    );
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      yes.disabled = true;
      problem.textContent = "";
      try {
        result = await action(Object.fromEntries(new FormData(form)));
        element.close();
      } catch (error) {
        problem.textContent = error.message;
        yes.disabled = false;
      }
    });
    const element = open(title, [form], () => resolve(result));
  });
}

// The two fields of whoever decides something; the name is remembered in this browser.
export function whoAndWhy({ required = true } = {}) {
  const value = localStorage.getItem(WHO) ?? "";
  const by = h("input", { name: "by", required, maxlength: 300, autocomplete: "name", value });
  by.addEventListener("change", () => localStorage.setItem(WHO, by.value));
  const why = h("input", { name: "why", required, maxlength: 1000, autocomplete: "off", autofocus: true });
  return [
    h("label", { class: "field" }, "Why (for the history) ", why),
    h("label", { class: "field" }, "Your name ", by),
  ];
}

const WHO = "smes-who";
