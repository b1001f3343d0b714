// The feature browser of report.html. Text from the data enters the page as text nodes and titles, never as markup.
"use strict";
(() => {
  const ROWS = 50; // features on one page of the list
  const AROUND = 7; // tokens on either side of the peak in the list
  const SHADES = 16;

  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const number = (x) => (x === null ? "–" : String(Number(x.toPrecision(3))));
  const percent = (x) => (x === null ? "–" : `${number(100 * x)} %`);
  const count = (x, noun) => `${x.toLocaleString("en")} ${noun}${x === 1 ? "" : "s"}`;

  // base64 of zlib of JSON; small, and no text of the data can end its script element.
  async function unpack(script) {
    const text = atob(script.textContent);
    const bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).json();
  }

  const continues = (token) => token.length > 2 && token.startsWith("##");

  function span(token, value, shade, peak) {
    const kind = continues(token) ? " piece" : /^\[\w+\]$/.test(token) ? " special" : "";
    return make("span", {
      className: `token${kind}${shade ? ` up l${shade}` : ""}${peak ? " peak" : ""}`,
      title: `${token}: ${value}`,
      textContent: kind === " piece" ? token.slice(2) : token.trim() ? token : "␣",
    });
  }

  function start(root) {
    const name = root.dataset.name;
    const part = (role) => root.querySelector(`[data-part=${role}]`);
    const [groupBox, searchBox, firesBox, statusBox, aliveBox, sortBox, turn] =
      ["group", "search", "fires", "status", "alive", "sort", "turn"].map(part);
    const [note, list, pager, detail] = ["note", "list", "pager", "detail"].map(part);
    const [tokenScript, ...groupScripts] = root.querySelectorAll("script");
    const loaded = []; // promises of the groups asked for so far
    let words; // the token strings
    let group, current, wanted; // the data of the group on show, its number, and the number of the one asked for last
    let shown; // positions within the group, filtered and sorted
    let query, page, opened;
    let ascending = true;

    const address = (at, feature) => `#feature-${name}-${at}-${feature}`;
    const here = (at) => address(current, group.index[at]);

    // --- tokens

    function sentence(feature, [ids, levels, , peak], from = 0, to = ids.length) {
      from = Math.max(from, 0);
      to = Math.min(to, ids.length);
      while (from > 0 && continues(words[ids[from]])) from--;
      while (to < ids.length && continues(words[ids[to]])) to++;
      const box = make("span", { className: "sentence" }, from > 0 ? "… " : "");
      for (let at = from; at < to; at++) {
        const word = words[ids[at]];
        if (at > from && !continues(word)) box.append(" ");
        const value = levels[at] ? number((levels[at] / 255) * group.scale[feature]) : "0";
        box.append(span(word, value, Math.ceil((levels[at] / 255) * SHADES), at === peak));
      }
      box.append(to < ids.length ? " …" : "");
      return box;
    }

    // What is searched in a feature: its contexts with word pieces joined, then the pieces as they are written.
    function searchText(contexts, fires) {
      const pieces = new Set();
      let text = "";
      for (const [ids, levels] of contexts) {
        text += "\n";
        let last = -2;
        ids.forEach((id, at) => {
          if (fires && !levels[at]) return;
          const word = words[id];
          if (continues(word)) pieces.add(word);
          text += continues(word) && last === at - 1 ? word.slice(2) : ` ${continues(word) ? word.slice(2) : word}`;
          last = at;
        });
      }
      return `${text}\n${[...pieces].join("\n")}`.toLowerCase();
    }

    // --- the list

    function select() {
      query = searchBox.value.trim().toLowerCase();
      const feature = /^#?\d+$/.test(query) ? Number(query.replace("#", "")) : -1;
      const texts = firesBox.checked ? "fireTexts" : "texts";
      if (query) group[texts] ??= group.contexts.map((contexts) => searchText(contexts, firesBox.checked));
      shown = [];
      group.index.forEach((index, at) => {
        const fits = !query || index === feature || group[texts][at].includes(query);
        const status = statusBox.value === "" || group.status[at] === statusBox.value;
        if (fits && status && (!aliveBox.checked || group.density[at] > 0)) shown.push(at);
      });
      const column = group[sortBox.value];
      const sign = ascending ? 1 : -1;
      shown.sort((a, b) => {
        const [x, y] = column ? [column[a], column[b]] : [a, b];
        return (x === null) - (y === null) || sign * (x - y) || a - b; // what has no value comes last either way
      });
      page = 0;
      draw();
    }

    // The strongest context, around its peak; or all of the first context in which the words searched for are.
    function sample(at) {
      const contexts = group.contexts[at];
      if (!contexts.length) return make("span", { className: "sentence soft" }, "no contexts");
      const found = query && contexts.find((item) => searchText([item], firesBox.checked).includes(query));
      const peak = contexts[0][3];
      return found ? sentence(at, found) : sentence(at, contexts[0], peak - AROUND, peak + AROUND + 1);
    }

    function row(at) {
      const fact = (label, text) => make("span", {}, make("span", { className: "soft" }, `${label} `), text);
      const measured = (label, measure, x) =>
        x === null ? fact(label ?? "", "") : fact(label === null ? measure : `${label}, ${measure}`, number(x));
      const link = make(
        "a",
        { className: "row", href: here(at) },
        make("strong", {}, make("span", { className: "unseen" }, "Feature "), String(group.index[at])),
        fact("density", percent(group.density[at])),
        fact("max", number(group.max[at])),
        measured(group.label[at], "AUROC", group.auroc[at]),
        measured(group.status[at], "cosine", group.cosine[at]),
        sample(at),
      );
      return make("li", {}, link);
    }

    function draw() {
      const pages = Math.max(1, Math.ceil(shown.length / ROWS));
      note.textContent = `${shown.length.toLocaleString("en")} of ${count(group.index.length, "feature")}`;
      turn.textContent = ascending ? "↑ ascending" : "↓ descending";
      list.replaceChildren(...shown.slice(page * ROWS, (page + 1) * ROWS).map(row));
      const [back, where, forth] = pager.children;
      where.textContent = `page ${page + 1} of ${pages}`;
      back.disabled = page === 0;
      forth.disabled = page === pages - 1;
      show(false);
    }

    function show(feature) {
      detail.hidden = !feature;
      list.hidden = pager.hidden = note.hidden = feature;
    }

    // --- one feature

    function context(at, item) {
      const [, levels, label, peak] = item;
      const value = levels.length ? number((levels[peak] / 255) * group.scale[at]) : "–";
      const line = make("li", {}, make("span", { className: "soft" }, value), sentence(at, item));
      if (label !== null) line.append(make("span", { className: "tag" }, label));
      return line;
    }

    function matched(at) {
      if (group.matched[at] === null) return [];
      const feature = group.matched[at];
      const text = `feature ${feature}`;
      const link = group.against === null ? text : make("a", { href: address(group.against, feature) }, text);
      const where = group.against === null ? "" : ` of ${groupBox.options[group.against].text}`;
      return [link, `${where}, cosine ${number(group.cosine[at])}`];
    }

    function describe(at) {
      const contexts = group.contexts[at];
      const rows = [
        ["Group", [groupBox.selectedOptions[0].text]],
        ["Density", [`${percent(group.density[at])} of the tokens`]],
        ["Activation", [`max ${number(group.max[at])}, mean when active ${number(group.mean[at])}`]],
      ];
      if (group.label[at] !== null || group.auroc[at] !== null || group.mi[at] !== null) {
        const numbers = `AUROC ${number(group.auroc[at])}, mutual information ${number(group.mi[at])}`;
        rows.push(["Association", [group.label[at] === null ? numbers : `${group.label[at]}: ${numbers}`]]);
      }
      if (group.status[at] !== null) rows.push(["Status", [group.status[at]]]);
      if (group.matched[at] !== null) rows.push(["Nearest", matched(at)]);
      const facts = make("dl", {});
      for (const [term, content] of rows) facts.append(make("dt", {}, term), make("dd", {}, ...content));
      const head = make("h3", { tabIndex: -1 }, `Feature ${group.index[at]}`);
      const place = shown.indexOf(at);
      const way = (text, to) => to !== undefined && ways.append(make("a", { href: here(to) }, text));
      const ways = make("p", { className: "ways" }, make("a", { href: `#${root.id}` }, "Back to the list"));
      way("Previous in the list", shown[place - 1]);
      if (place >= 0) way("Next in the list", shown[place + 1]);
      const legend = make("p", { className: "legend soft" }, "0 ");
      for (let shade = 1; shade <= SHADES; shade += 3) legend.append(make("span", { className: `up l${shade}` }, " "));
      legend.append(` ${number(group.scale[at])}; the strongest token of a context is underlined`);
      const lines = make("ol", { className: "contexts" }, ...contexts.map((item) => context(at, item)));
      detail.replaceChildren(ways, head, facts, ...(contexts.length ? [legend, lines] : ["It has no contexts."]));
      show(true);
      head.focus({ preventScroll: true });
      detail.scrollIntoView();
    }

    // --- what the reader does

    async function choose(at) {
      note.textContent = "loading …";
      wanted = at;
      words ??= await unpack(tokenScript);
      const data = await (loaded[at] ??= unpack(groupScripts[at]));
      if (wanted !== at) return; // the reader was faster
      [group, current] = [data, at];
      groupBox.selectedIndex = at;
      const kept = statusBox.value;
      const names = [...new Set(group.status)].filter((status) => status !== null);
      statusBox.replaceChildren(new Option("any", ""), ...names.map((status) => new Option(status)));
      statusBox.value = names.includes(kept) ? kept : "";
      statusBox.parentElement.hidden = names.length === 0;
      for (const option of sortBox.options) option.hidden = group[option.value]?.every((value) => value === null);
      select();
    }

    async function follow() {
      const [, browser, at, feature] = /^#feature-(.+)-(\d+)-(\d+)$/.exec(location.hash) ?? [];
      if (browser === name && at in groupScripts) {
        if (Number(at) !== current) await choose(Number(at));
        opened = group.index.indexOf(Number(feature));
        if (opened >= 0) return describe(opened);
        detail.replaceChildren(make("p", {}, `There is no feature ${feature} in this group.`));
        return show(true);
      }
      if (!group) await choose(0);
      if (detail.hidden || !["", `#${root.id}`].includes(location.hash)) return;
      const place = shown.indexOf(opened);
      page = Math.floor(Math.max(place, 0) / ROWS);
      draw();
      if (place >= 0) list.children[place % ROWS].firstChild.focus();
    }

    const attempt = (action) => async () => {
      try {
        await action();
      } catch (error) {
        note.textContent = `The features cannot be shown: ${error.message}`;
        note.hidden = false;
      }
    };
    // Another list: the address no longer names a feature.
    const changed = (action) => () => {
      if (!detail.hidden) history.replaceState(null, "", `#${root.id}`);
      attempt(action)();
    };
    const turnPage = (step) => {
      page += step;
      draw();
      root.scrollIntoView();
    };
    groupBox.addEventListener("change", changed(() => choose(groupBox.selectedIndex)));
    for (const box of [searchBox, firesBox, statusBox, aliveBox]) box.addEventListener("input", changed(select));
    sortBox.addEventListener("change", changed(() => {
      ascending = ["listed", "index"].includes(sortBox.value); // of everything else the largest come first
      select();
    }));
    turn.addEventListener("click", changed(() => {
      ascending = !ascending;
      select();
    }));
    pager.children[0].addEventListener("click", () => turnPage(-1));
    pager.children[2].addEventListener("click", () => turnPage(1));
    addEventListener("hashchange", attempt(follow));
    part("panel").hidden = false;
    attempt(follow)();
  }

  document.querySelectorAll(".browser").forEach(start);
})();
