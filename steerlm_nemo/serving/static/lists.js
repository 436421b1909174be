// Results of a form, the newest first: kept over a reload, and cleared only with a way back.

import { $, button, tell } from "./elements.js";
import { keep, kept } from "./kept.js";

/**
 * `make` turns what is kept of a result into an element. `ids` are those of the elements for the list, for the button that
 * clears it, for what is said of that, and of what is shown where nothing is in it.
 */
export function makeList(key, make, ids) {
  let items = []; // {data, element}, the newest first

  function changed() {
    keep(
      key(),
      items.map(({ data }) => data),
    );
    $(ids.clear).disabled = !items.length;
    if (ids.empty) $(ids.empty).hidden = items.length > 0;
  }

  function fill(all) {
    items = all;
    $(ids.list).replaceChildren(...all.map((item) => item.element));
    changed();
  }

  $(ids.clear).onclick = () => {
    const old = items;
    fill([]);
    const undo = button("Bring it back", () => {
      tell($(ids.told), null);
      fill([...items, ...old]);
      $(ids.clear).focus();
    });
    tell($(ids.told), "The list is cleared, and this tab keeps it no longer.", undo);
    undo.focus();
  };

  return {
    add(data, element) {
      tell($(ids.told), null);
      items.unshift({ data, element });
      $(ids.list).prepend(element);
      changed();
    },
    remove(element) {
      element.remove();
      items = items.filter((item) => item.element !== element);
      changed();
    },
    restore() {
      fill((kept(key()) ?? []).map((data) => ({ data, element: make(data) })));
    },
    changed,
  };
}
