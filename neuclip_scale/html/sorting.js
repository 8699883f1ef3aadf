// Tables of class "sortable" are sorted by a click on a heading; a cell's data-value wins over its text.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((heading, column) => {
    heading.tabIndex = 0;
    const sort = () => {
      const falling = heading.getAttribute("aria-sort") !== "descending";
      table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const body = table.tBodies[0];
      [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        // Numbers before texts, and what is empty last either way.
        const kind = text => text.trim() === "" ? 2 : isNaN(text) ? 1 : 0;
        if (kind(x) === 2 || kind(y) === 2) return kind(x) - kind(y);
        const order = kind(x) - kind(y) || (kind(x) ? x.localeCompare(y) : x - y);
        return falling ? -order : order;
      }).forEach(row => body.append(row));
    };
    heading.addEventListener("click", sort);
    heading.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
