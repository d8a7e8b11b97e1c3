"use strict";
(() => {
  const PAGE = 25;
  const find = (id) => document.getElementById(id);
  const show = (id) => { find(id).hidden = false; };

  const samples = () => {
    const list = find("samples-list");
    if (!list) return;
    const all = [...list.querySelectorAll("li")];
    list.replaceChildren();
    const stack = document.createElement("ol");
    stack.className = "samples";
    list.append(stack);
    const text = new Map(all.map((item) => [item, item.textContent.toLowerCase()]));
    const value = (item, name) => item.dataset[name] === "" ? NaN : Number(item.dataset[name]);
    // Samples without a value come last in both directions.
    const by = (name, sign) => (a, b) => {
      const x = value(a, name), y = value(b, name);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y) || value(a, "at") - value(b, "at");
    };
    const orders = {
      measured: by("at", 1), gain: by("gain", -1), loss: by("gain", 1), best: by("reward", -1),
      worst: by("reward", 1), longest: by("length", -1), shortest: by("length", 1), grown: by("grown", -1),
      shrunk: by("grown", 1),
    };
    const kinds = {
      all: () => true, up: (i) => value(i, "gain") > 0, down: (i) => value(i, "gain") < 0,
      same: (i) => value(i, "gain") === 0, none: (i) => Number.isNaN(value(i, "gain")),
      cut: (i) => i.dataset.cut === "1",
    };
    let page = 0, matching = all;
    const draw = () => {
      const pages = Math.max(1, Math.ceil(matching.length / PAGE));
      page = Math.min(page, pages - 1);
      const first = page * PAGE;
      const shown = matching.slice(first, first + PAGE);
      stack.replaceChildren(...shown);
      find("samples-count").textContent = shown.length
        ? `${first + 1} to ${first + shown.length} of ${matching.length}` : "No sample matches.";
      find("samples-previous").disabled = page === 0;
      find("samples-next").disabled = page === pages - 1;
    };
    const choose = () => {
      const words = find("samples-search").value.toLowerCase().trim();
      const kind = kinds[find("samples-kind").value];
      const run = find("samples-run") ? find("samples-run").value : "";
      matching = all.filter((i) => kind(i) && (!run || i.dataset.run === run) && text.get(i).includes(words));
      matching.sort(orders[find("samples-order").value]);
      page = 0;
      draw();
    };
    const turn = (by) => () => { page += by; draw(); find("samples").scrollIntoView(); };
    for (const id of ["samples-order", "samples-kind", "samples-run"])
      if (find(id)) find(id).addEventListener("change", choose);
    find("samples-search").addEventListener("input", choose);
    find("samples-previous").addEventListener("click", turn(-1));
    find("samples-next").addEventListener("click", turn(1));
    show("samples-controls");
    show("samples-pages");
    choose();
  };

  const settings = () => {
    const search = find("settings-search");
    if (!search) return;
    const only = find("settings-only");
    const rows = [...document.querySelectorAll(".settings tbody tr")];
    const choose = () => {
      const words = search.value.toLowerCase().trim();
      for (const row of rows) {
        const differs = !only || !only.checked || row.classList.contains("differs");
        row.hidden = !differs || !row.textContent.toLowerCase().includes(words);
      }
    };
    search.addEventListener("input", choose);
    if (only) only.addEventListener("change", choose);
    show("settings-controls");
    choose();
  };

  const printing = () => {
    let opened = [];
    addEventListener("beforeprint", () => {
      opened = [...document.querySelectorAll("details.sample:not([open])")];
      for (const item of opened) item.open = true;
    });
    addEventListener("afterprint", () => { for (const item of opened) item.open = false; });
  };

  samples();
  settings();
  printing();
})();
