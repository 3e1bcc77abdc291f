// A lesson's controls: show the result that belongs to the chosen value. All results are in the page.
document.addEventListener("DOMContentLoaded", () => {
  for (const control of document.querySelectorAll(".control input, .control select")) {
    const show = () => {
      if (control.dataset.values) {
        const text = JSON.parse(control.dataset.values)[control.value];
        control.setAttribute("aria-valuetext", text);
        control.nextElementSibling.textContent = text;
      }
      for (const result of document.querySelectorAll(`[data-control="${control.id}"]`))
        for (const variant of result.children) variant.hidden = variant.dataset.value !== control.value;
    };
    control.addEventListener("input", show);
    control.disabled = false; // without JavaScript, a control shows that it does nothing
    show(); // browsers restore a changed control when a page is loaded again
  }
});
