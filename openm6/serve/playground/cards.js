// A click on a card of the gallery, but on its audio, chooses it.
const choose = (event) => {
    const card = event.target.closest(".card");
    if (card && event.target.tagName !== "AUDIO" && (event.type === "click" || event.key === "Enter"))
        trigger("click", {name: card.dataset.name, index: Number(card.dataset.index)});
};
element.addEventListener("click", choose);
element.addEventListener("keydown", choose);
