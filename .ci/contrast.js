// Every text whose colour is too near to what lies behind it, and every field whose
// border is (WCAG AA asks for 4.5 and 3).
(() => {
  const light = (colour) => {
    const parts = colour.match(/[\d.]+/g).slice(0, 3).map((n) => n / 255);
    const bend = (c) => c <= .04 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const [r, g, b] = parts.map(bend);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : colour;
  };
  const ratio = (one, other) => {
    const [a, b] = [light(one), light(other)];
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  };
  const found = [];
  const all = document.querySelectorAll("body *:not(script, style, option)");
  for (const element of all) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!element.checkVisibility() || !(own || element.placeholder)) continue;
    const kind = element.placeholder ? "::placeholder" : null;
    const style = getComputedStyle(element, kind), shown = element.outerHTML.slice(0, 80);
    const texts = ratio(style.color, behind(element));
    if (texts < 4.5) found.push([shown, texts]);
    const edges = kind && ratio(getComputedStyle(element).borderColor, behind(element));
    if (kind && edges < 3) found.push([shown, edges]);
  }
  return found;
})()
