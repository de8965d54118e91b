// The frame of all pages: links between them, the head, the refresh loop, the keys and the token.

import { createApi, token } from "./lib/api.js";
import { closing, open as openDialog } from "./lib/dialog.js";
import { h, show } from "./lib/dom.js";
import * as format from "./lib/format.js";
import * as palette from "./lib/palette.js";
import { table } from "./lib/table.js";

const EVERY_MS = 1000;
const PAGES = [
  ["flow", "Flow"],
  ["learning", "Learning"],
  ["experts", "Experts"],
  ["versions", "Versions"],
  ["letters", "Dead letters"],
  ["try_it", "Try it"],
];

const at = (id) => document.getElementById(id);
const root = at("page");
const context = { api: createApi(askForToken), format, table, palette };
let page = null; // {name, view}
let paused = false;
let turn = 0; // counts the pages that were opened, so that a slow one does not replace a later one

// ---- pages

at("tabs").append(
  ...PAGES.map(([name, title], n) => h("a", { href: `#/${name}`, "aria-keyshortcuts": String(n + 1) }, title)),
);

function wanted() {
  const shared = new URLSearchParams(location.hash.slice(1)).get("token");
  if (shared) {
    token.set(shared);
    history.replaceState(null, "", "#/flow"); // the token stays in no history
  }
  const name = location.hash.replace(/^#\/?/, "").split(/[/?]/)[0];
  return PAGES.some(([known]) => known === name) ? name : "flow";
}

async function open() {
  const name = wanted();
  if (page?.name === name) return;
  if (page) root.focus({ preventScroll: true }); // the keyboard goes on in the new page
  const mine = ++turn;
  page?.view?.unmount?.();
  page = { name, view: null };
  root.replaceChildren();
  root.removeAttribute("aria-busy");
  for (const link of at("tabs").children) {
    if (link.getAttribute("href") === `#/${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  try {
    const module = await import(`./pages/${name}.js`);
    if (mine !== turn) return;
    document.title = `${module.title} · SMES Online`;
    root.append(h("h1", {}, module.title));
    page.view = module.mount(root, context);
  } catch (error) {
    if (mine !== turn) return;
    console.error(error);
    root.append(h("p", { class: "problem", role: "alert" }, `This page could not be opened: ${error.message}`));
    return;
  }
  await refresh(mine);
}

// ---- the refresh loop: the next look begins when the last one has ended

let timer = null;
let looking = false;

async function refresh() {
  if (looking) return;
  looking = true;
  clearTimeout(timer);
  const { view } = page ?? {};
  const [ofHead, ofPage] = await Promise.allSettled([head(), Promise.resolve().then(() => view?.update())]);
  looking = false;
  const failed = [ofHead, ofPage].find((each) => each.status === "rejected")?.reason;
  if (failed && !(failed.name === "ApiError")) console.error(failed);
  problem(failed ?? null);
  const missed = view !== page?.view; // another page was opened meanwhile
  if (!paused && !document.hidden) timer = setTimeout(refresh, missed ? 0 : EVERY_MS);
}

let awaySince = null;

function problem(error) {
  awaySince = error ? (awaySince ?? Date.now()) : null;
  const text = error ? `${error.message} (${format.since(awaySince)})` : paused ? "paused; p goes on" : "";
  show(at("refresh"), text, null);
  at("refresh").className = error ? "problem" : "quiet";
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) clearTimeout(timer);
  else if (!paused) refresh();
});

// ---- the head

async function head() {
  const { namespace, schema, in_service: served, alarms } = await context.api.get("api/header");
  show(at("deployment"), schema ? `${namespace} · ${schema}` : namespace, namespace);
  at("deployment").title = "Namespace of the deployment, and its schema";
  const said = served.version === null ? "nothing in service" : `${served.lineage}:${served.version}`;
  const age = served.age_ms === null ? "" : `, ${format.duration(served.age_ms)} old`;
  const newest = served.source === "snapshots" ? "newest published " : "in service ";
  const text = served.version === null ? said : `${newest}${said}${age}`;
  show(at("service"), text, served.version);
  at("service").title =
    served.source === "snapshots" ? "The scorer does not say what it serves" : "What the scorer answers with";
  const wanted = alarms.map(({ source, text, since_ms }) =>
    [source, text.startsWith(source) ? text.slice(source.length).replace(/^:? /, "") : text, since_ms],
  );
  const shown = JSON.stringify(wanted);
  if (at("alarms").dataset.shown === shown) return;
  at("alarms").dataset.shown = shown;
  // Read aloud when something else is wrong, and not whenever a number in it grows.
  const aloud = wanted.map(([source, text]) => `${source}: ${text}`).join(". ");
  if (aloud.replace(/\d+/g, "") !== at("said").textContent.replace(/\d+/g, "")) at("said").textContent = aloud;
  at("alarms").replaceChildren(...wanted.map(([source, text, since]) => alarm(source, text, since)));
}

function alarm(source, text, since) {
  return h(
    "p",
    { class: "alarm", "data-alarm": source },
    h("span", { "aria-hidden": "true" }, "▲ "),
    h("strong", {}, `${source}: `),
    text,
    since ? h("span", { class: "quiet" }, ` ${format.since(since)}`) : null,
  );
}

// ---- dialogs: the token, and the keys

let asking = null; // one dialog, however many requests need the token

function askForToken(why) {
  asking ??= new Promise((resolve) => {
    const field = h("input", { type: "password", id: "token", autocomplete: "off", required: true, size: 40 });
    const form = h(
      "form",
      { method: "dialog" },
      h("p", { id: "token-why" }, why),
      h("label", { for: "token" }, "Token "),
      field,
      h(
        "p",
        { class: "buttons" },
        h("button", { value: "use" }, "Use it"),
        h("button", { value: "", formnovalidate: true }, "Cancel"),
      ),
    );
    openDialog("Sign in", [form], (value) => {
      asking = null;
      resolve(value === "use" ? field.value.trim() : null);
    });
  });
  return asking;
}

async function giveToken() {
  const given = await askForToken("The part after #token= of the address that `smes console` printed.");
  if (!given) return;
  context.api.use(given);
  refresh();
}

function listKeys() {
  if (document.querySelector("dialog")) return;
  const own = (page?.view?.keys ?? []).map(({ key, label }) => [key, label]);
  const keys = [
    ...PAGES.map(([, title], n) => [String(n + 1), title]),
    ["p", paused ? "go on refreshing" : "pause refreshing"],
    ["t", "give a token"],
    ["?", "this list"],
    ...own,
  ];
  openDialog("Keys", [
    h("dl", { class: "keys" }, keys.map(([key, label]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, label)])),
    closing(),
  ]);
}

document.addEventListener("keydown", (event) => {
  const { target } = event;
  if (event.ctrlKey || event.altKey || event.metaKey || event.defaultPrevented) return;
  if (target.closest("input, textarea, select, dialog, [contenteditable]")) return;
  const digit = Number(event.key);
  if (digit >= 1 && digit <= PAGES.length) location.hash = `#/${PAGES[digit - 1][0]}`;
  else if (event.key === "?") listKeys();
  else if (event.key === "t") giveToken();
  else if (event.key === "p") {
    paused = !paused;
    problem(null);
    if (paused) clearTimeout(timer);
    else refresh();
  } else {
    const own = page?.view?.keys?.find(({ key }) => key === event.key);
    if (!own) return;
    own.run();
  }
  event.preventDefault();
});

at("help").addEventListener("click", listKeys);
addEventListener("hashchange", open);
open();
