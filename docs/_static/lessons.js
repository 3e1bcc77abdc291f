// A lesson's controls: show the result that belongs to the chosen value. All results are in the page.
document.addEventListener("DOMContentLoaded", () => {
  for (const input of document.querySelectorAll("input[data-values]")) {
    const values = JSON.parse(input.dataset.values);
    const show = () => {
      input.setAttribute("aria-valuetext", values[input.value]);
      input.nextElementSibling.textContent = values[input.value];
      for (const result of document.querySelectorAll(`[data-control="${input.id}"]`))
        for (const variant of result.children) variant.hidden = variant.dataset.value !== input.value;
    };
    input.addEventListener("input", show);
    show(); // browsers restore a moved control when a page is loaded again
  }
});
