// The script of the page in the browser: called once, in the head, with the visitor's language and
// texts by name.
(texts) => {
  "use strict";
  const TABS = ["edit", "region", "batch"];
  const KEPT = "step1x-edit";
  const find = (selector) => document.querySelector(selector);

  // Gradio knows some language tags and uses English for all others: zh-HK, zh-SG, zh-Hant.
  Object.defineProperty(navigator, "language", { value: texts.language });

  // A browser requests module scripts with an Origin. If a proxy replaces Host, the server takes
  // them for another site's and refuses them: the page would stay blank without an error.
  addEventListener("error", ({ target }) => {
    if (!(target instanceof HTMLScriptElement) || !target.src.includes("/assets/")) return;
    const box = document.createElement("p");
    box.id = "blocked";
    box.setAttribute("role", "alert");
    box.style.cssText = "max-width: 40em; margin: 2em auto; padding: 0 1em; line-height: 1.5";
    box.textContent = texts.blocked;
    (document.body ?? document.documentElement).prepend(box);
  }, true);

  // --- what survives a reload; Gradio reloads after its server was unreachable ---
  let kept = {};
  try { kept = JSON.parse(sessionStorage.getItem(KEPT)) ?? {}; } catch { /* nothing is kept */ }

  addEventListener("pagehide", () => {
    const prompts = TABS.map((tab, i) => find(`#${tab}-prompt textarea`)?.value ?? kept.prompts?.[i] ?? "");
    const picture = !!find("#edit-picture img, #region-picture img, #batch-files .file");
    try {
      sessionStorage.setItem(KEPT, JSON.stringify({ server: gradio_config.app_id, prompts, picture }));
    } catch { /* a browser without storage */ }
  });

  // The prompts of the tabs, and the notice to show.
  const restored = () => {
    const isNew = kept.server !== undefined && kept.server !== gradio_config.app_id;
    const words = isNew ? [texts.restarted, kept.picture ? texts.lost : ""].join(" ").trim() : "";
    const notice = words && `<div class="notice" role="status">${words}</div>`;
    return [...TABS.map((_, i) => kept.prompts?.[i] ?? ""), notice];
  };

  // Gradio reports a lost connection in English, whatever the language.
  const GONE = "Connection to the server was lost";
  new MutationObserver(() => {
    for (const message of document.querySelectorAll("[data-testid=toast-text]")) {
      for (const part of message.childNodes) {
        if (!part.data?.startsWith(GONE)) continue;
        part.data = texts.disconnected;
        find(".chip .pill").innerHTML = `<b class="gone"></b>${texts.offline}`;
      }
    }
  }).observe(document, { childList: true, subtree: true });

  // --- files ---
  // Gradio refuses, in English, files that the browser does not take for pictures, such as HEIC.
  // Here all files are sent: the server examines them and reports errors.
  const boxes = "#edit-picture, #region-picture, #batch-files";
  const arePictures = (files) => [...files].every((file) => file.type.startsWith("image/"));
  const asPictures = (files) => {
    const given = new DataTransfer();
    for (const file of files) given.items.add(new File([file], file.name, { type: "image/unknown" }));
    return given.files;
  };

  addEventListener("change", ({ target }) => {
    if (!target.matches?.("input[type=file]") || !target.closest(boxes)) return;
    if (!arePictures(target.files)) target.files = asPictures(target.files);
  }, true);

  addEventListener("drop", (event) => {
    const input = event.target.closest?.(boxes)?.querySelector("input[type=file]");
    if (!input || arePictures(event.dataTransfer.files)) return;
    event.preventDefault();
    event.stopPropagation();
    input.files = asPictures(event.dataTransfer.files);
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }, true);

  // --- keys ---
  addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    const run = TABS.map((tab) => find(`#${tab}-run`)).find((button) => button?.offsetParent);
    if (!run) return;
    event.preventDefault();
    event.stopPropagation();
    if (!event.target.closest("textarea")) run.focus();  // a number is applied on blur
    run.click();
  }, true);

  addEventListener("click", ({ target }) => {
    if (target.closest?.("#edit-run, #region-run, #batch-run")) find("#notice")?.style.setProperty("display", "none");
    if (target.closest?.(".compare button")) {
      if (document.fullscreenElement) document.exitFullscreen();
      else target.closest(".compare").requestFullscreen();
    }
  }, true);

  // --- before and after ---
  // The position is kept outside of the element that Gradio replaces with each preview.
  addEventListener("input", ({ target }) => {
    if (target.matches?.(".compare input")) {
      target.closest(".result").style.setProperty("--at", `${target.value}%`);
    }
  });
  document.addEventListener("focusin", ({ target }) => {
    const at = target.matches?.(".compare input") && target.closest(".result").style.getPropertyValue("--at");
    if (at) target.value = parseFloat(at);
  });

  // --- a tab in the background says that its edit has ended ---
  const title = "step1x-edit";
  const ended = () => { if (document.hidden) document.title = `✓ ${title}`; return []; };
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && document.title.startsWith("✓")) document.title = title;
  });

  window.step1xEdit = { restored, ended };
}
