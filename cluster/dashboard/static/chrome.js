// Theme and tooltips: what the page itself does, apart from its numbers.

const THEMES = ["auto", "light", "dark"];
const THEME_WORDS = { auto: "as the system has them", light: "light", dark: "dark" };

export function installTheme(onChange) {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = readChoice();
  const apply = () => {
    const isDark = chosen === "dark" || (chosen === "auto" && system.matches);
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    button.textContent = chosen;
    button.setAttribute("aria-label", `Colours: ${THEME_WORDS[chosen]}`);
    onChange();
  };
  button.addEventListener("click", () => {
    chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
    keepChoice(chosen);
    apply();
  });
  system.addEventListener("change", apply);
  apply();
}

// Storage may be forbidden: the choice then lasts as long as the page.
function readChoice() {
  try {
    const kept = localStorage.getItem("wattline-theme");
    return THEMES.includes(kept) ? kept : "auto";
  } catch {
    return "auto";
  }
}

function keepChoice(choice) {
  try {
    localStorage.setItem("wattline-theme", choice);
  } catch {
    return;
  }
}

// One tooltip for all that has a `data-tip`: on hover, on focus, on tap; Escape closes it.
export function installTips() {
  const tip = document.getElementById("tip");
  let shownFor = null;
  const show = (term) => {
    shownFor = term;
    tip.textContent = term.dataset.tip;
    tip.hidden = false;
    term.setAttribute("aria-describedby", "tip");
    place(term);
  };
  const place = (term) => {
    const at = term.getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const below = at.bottom + 6 + size.height < innerHeight;
    tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
    tip.style.top = `${below ? at.bottom + 6 : at.top - size.height - 6}px`;
  };
  const hide = () => {
    shownFor?.removeAttribute("aria-describedby");
    shownFor = null;
    tip.hidden = true;
  };
  for (const [enter, leave] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
    document.addEventListener(enter, (event) => {
      const term = event.target.closest?.("[data-tip]");
      if (term) show(term);
    });
    document.addEventListener(leave, hide);
  }
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  // Focus may scroll: what has it keeps its tip.
  addEventListener("scroll", () => (shownFor && shownFor === document.activeElement ? place(shownFor) : hide()), { passive: true });
}

// A click on `.copy`, or Enter, copies its `data-copy`; the tooltip says that it did.
export function installCopying() {
  const tip = document.getElementById("tip");
  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.(".copy");
    if (!button) return;
    const text = button.dataset.copy;
    tip.textContent = (await copy(text)) ? `copied: ${text}` : text;
  });
}

// Browsers give a page without TLS no clipboard; the old way still works there.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const put = (event) => {
      event.clipboardData.setData("text/plain", text);
      event.preventDefault();
    };
    document.addEventListener("copy", put);
    const isCopied = document.execCommand("copy");
    document.removeEventListener("copy", put);
    return isCopied;
  }
}
