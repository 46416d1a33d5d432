"use strict";
// Filters of the gallery. Without this script every question is shown.
const form = document.querySelector("form.filters");
if (form) {
  const cards = [...document.querySelectorAll(".card")];
  const count = document.querySelector("#count");
  const apply = () => {
    const wanted = new FormData(form);
    let shown = 0;
    for (const card of cards) {
      let any = false;
      for (const question of card.querySelectorAll(".question")) {
        const fits = ["change", "type", "sensor"].every(
          (name) => !wanted.get(name) || question.dataset[name] === wanted.get(name)
        );
        question.hidden = !fits;
        any = any || fits;
        shown += fits;
      }
      card.hidden = !any;
    }
    count.textContent = shown === 1 ? "1 question" : `${shown} questions`;
  };
  form.addEventListener("change", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  form.reset();
  apply();
}
