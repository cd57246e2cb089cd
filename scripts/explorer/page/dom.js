// Small helpers: elements, numbers, requests, and an image or the blank frame that stands for it.
const UNIT = 1000
export const $ = id => document.getElementById(id)

export function h(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag)
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  element.append(...children)
  return element
}

export const number = value => value.toLocaleString('en')
export const percent = share => `${Math.round(100 * share)} %`

export function say(id, text, bad = false) {
  $(id).textContent = text
  $(id).classList.toggle('bad', bad)
}

// The answer as an object. Throws an Error whose message is a sentence for the page.
export async function ask(path, signal) {
  let answer, body
  try { answer = await fetch(path, {signal}) }
  catch (error) {
    if (error.name === 'AbortError') throw error
    throw Error('The explorer does not answer. Is it still running where it was started?')
  }
  try { body = await answer.json() } catch { throw Error(`The explorer answered with status ${answer.status} and no reason.`) }
  if (!answer.ok) throw Error(body.error)
  return body
}

// Rectangles of an image's regions in units of a thousandth of its height, the largest first so that none hides one.
function rectangles({boxes, aspect}) {
  const area = ([x1, y1, x2, y2]) => (x2 - x1) * (y2 - y1)
  return (boxes ?? []).map((box, region) => ({box, region})).sort((a, b) => area(b.box) - area(a.box))
    .map(({box: [x1, y1, x2, y2], region}) => svg('rect',
      {x: x1 * UNIT * aspect, y: y1 * UNIT, width: (x2 - x1) * UNIT * aspect, height: (y2 - y1) * UNIT, 'data-region': region}))
}

// An image with its regions over it; where there is no file, the regions on a blank frame.
export function drawn(look, alt, withRegions = !look.file) {
  const frame = h('span', {className: look.file ? 'frame' : 'frame bare'})
  if (look.file) frame.append(h('img', {src: `images/${look.image}`, alt, loading: 'lazy', decoding: 'async'}))
  if (withRegions) frame.append(svg('svg', {viewBox: `0 0 ${UNIT * look.aspect} ${UNIT}`, 'aria-hidden': 'true'}, ...rectangles(look)))
  return frame
}
