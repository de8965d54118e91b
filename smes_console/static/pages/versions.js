export const title = "Versions";

export function mount(root, context) {
  return { update() {}, unmount() {} };
}
